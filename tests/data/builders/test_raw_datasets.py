"""Facts about the public data sets: what their owners' files become, and that ViLT's arrow files become the same."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import raw_trees
from batches import Letters
from PIL import Image

from scl_jax.config import default_config
from scl_jax.data.builders import builder_module, open_source, prepare, raw, vqav2
from scl_jax.data.builders.problems import LEFT_OUT_FILE, BrokenRecordsError
from scl_jax.data.prepare import prepare_dataset
from scl_jax.data.task_pipeline import class_names, task_dataset, task_evaluation_set
from scl_jax.data.video import decode_frames

LENGTH = 40
VIDEOS = ("webvid/captions", "msrvtt/captions", "lsmdc/captions")
UNNAMED_IN_ARROW = {"snli_ve/pairs": ("id", "text_ids"), "vqav2/questions": ("answers",)}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Every data set's tree and arrow files, by name."""
    root = tmp_path_factory.mktemp("trees")
    folders = {}
    for name, write in raw_trees.TREES.items():
        folders[name] = root / write.__name__ / "tree", root / write.__name__ / "arrow"
        write(*folders[name])
    return folders


@pytest.fixture
def tree(tmp_path):
    """Writes a fresh tree that a test may damage."""

    def write(name):
        raw_trees.TREES[name](tmp_path / "tree", tmp_path / "arrow")
        return tmp_path / "tree"

    return write


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    monkeypatch.setitem(vqav2.make_builder.__kwdefaults__, "answers_at_least", 2)
    monkeypatch.setattr(vqav2, "VALIDATION_IMAGES", 1)


def records(name, split, folder):
    source = open_source(name, split, folder)
    return [source[index] for index in range(len(source))]


def batch_of(name, folder, split):
    stream = default_config().data["videos" if name in VIDEOS else "images"]
    stream.update(image_size=32)
    options = {"data_dir": str(folder), "text_length": LENGTH, "tokenizer": Letters(), "batch_size": 16}
    (batch,) = task_evaluation_set(stream, (name,), split, **options).batches()
    return batch


@pytest.mark.parametrize("name", raw_trees.TREES)
def test_tree_and_arrow_files_give_the_same_examples(trees, tmp_path, name):
    for kind, source in zip(("tree", "arrow"), trees[name], strict=True):
        prepare(name, tmp_path / kind, source=str(source), workers=2)
    splits = builder_module(name.partition("/")[0]).DATASET.published
    for split in splits:
        ours, theirs = (records(name, split, tmp_path / kind) for kind in ("tree", "arrow"))
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - set(UNNAMED_IN_ARROW.get(name, ())):
                np.testing.assert_array_equal(one[key], other[key], err_msg=f"{split} {key}")
        one, other = (batch_of(name, tmp_path / kind, split) for kind in ("tree", "arrow"))
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=f"{split} {key}")
    assert class_names((name,), str(tmp_path / "tree")) == class_names((name,), str(tmp_path / "arrow"))


@pytest.mark.parametrize("name", raw_trees.TREES)
def test_every_miniature_has_the_tricky_cases(trees, tmp_path, name):
    """Text that is not ASCII, several texts, portraits, clips of one frame: none is lost on the way to a batch."""
    prepare(name, tmp_path, source=str(trees[name][0]))
    splits = builder_module(name.partition("/")[0]).DATASET.published
    found = [record for split in splits for record in records(name, split, tmp_path)]
    texts = [text for record in found for text in record["captions"]]
    assert any(not text.isascii() for text in texts)
    one_text = ("sbu/captions", "conceptual_captions/captions", "webvid/captions", "lsmdc/captions")
    assert (max(len(record["captions"]) for record in found) > 1) == (name not in one_text)
    batch = batch_of(name, tmp_path, next(iter(splits)))
    rows = batch["weight"] == 1
    if name in VIDEOS:
        moves = batch["pixels"][rows].std(axis=1).max(axis=(1, 2, 3)) > 1  # a clip of one frame stands still
        assert moves.any() and not moves.all() and batch["pixels"].shape[1] == 4
    else:
        sizes = [Image.open(io.BytesIO(record["media"])).size for record in found]
        assert any(width < height for width, height in sizes)
        assert batch["pixels"].shape[1:] == (1, 32, 32, 3)


def test_captions_of_an_image_stay_together_and_restval_trains(trees, tmp_path):
    prepare("coco/captions", tmp_path, source=str(trees["coco/captions"][0]))
    train = records("coco/captions", "train", tmp_path)
    assert [record["captions"] for record in train] == [raw_trees.CAPTIONS[0], raw_trees.CAPTIONS[1]]
    assert [record["media"] for record in train] == [raw_trees.jpeg(0), raw_trees.jpeg(1)]
    assert train[1]["id"] == "COCO_val2014_000000000001.jpg"
    assert open_source("coco/captions", "train", tmp_path).text_counts() == [3, 1]


def test_questions_get_soft_scores_of_the_vocabulary_of_train_and_val(trees, tmp_path):
    name = "vqav2/questions"
    folder = prepare(name, tmp_path, source=str(trees[name][0]))
    assert class_names((name,), str(tmp_path)) == ("cat", "2", "yes")
    train = batch_of(name, tmp_path, "train")
    ids = [text_id for record in records(name, "train", tmp_path) for text_id in record["text_ids"]]
    assert ids == ["10", "11", "20", "40", "41"]
    scores = [[1, 0, 0], [0.9, 1, 0], [0, 0, 1], [0.9, 0, 0], [0, 1, 0]]
    np.testing.assert_allclose(train["answer_scores"][:5], scores, rtol=1e-6)
    assert json.loads((folder / "metadata.json").read_text())["notes"]["train"] == {
        "questions: none of their answers is the most common one of at least 2 questions (--answers_at_least)": 1
    }
    stream = default_config().data.images
    options = {"data_dir": str(tmp_path), "text_length": LENGTH, "tokenizer": Letters(), "batch_size": 4}
    validation = task_evaluation_set(stream, (name,), "validation", **options)
    assert validation.answers(0) == ["yes"] * 10 and validation.text_id(0) == "30"
    for split in ("test", "test_dev"):
        test = batch_of(name, tmp_path, split)
        assert records(name, split, tmp_path)[0]["text_ids"] == ["50"] and not test["answer_scores"].any()


def test_statements_keep_their_identifiers_and_both_images(trees, tmp_path):
    prepare("nlvr2/statements", tmp_path, source=str(trees["nlvr2/statements"][0]))
    (first, second) = records("nlvr2/statements", "dev", tmp_path)
    assert first["text_ids"] == ["dev-7-0-0", "dev-7-0-1", "dev-7-0-2"] and first["labels"].tolist() == [1, 0, 1]
    assert (second["media"], second["second_media"]) == (raw_trees.png(1), raw_trees.png(6))


def test_hypotheses_keep_their_pairs_and_labels(trees, tmp_path):
    prepare("snli_ve/pairs", tmp_path, source=str(trees["snli_ve/pairs"][0]))
    first = records("snli_ve/pairs", "validation", tmp_path)[0]
    assert first["text_ids"][0] == "4705552913.jpg#0r1n" and first["labels"].tolist() == [0, 1, 2]
    assert first["captions"] == raw_trees.CAPTIONS[0]


def test_a_folder_of_frames_is_a_clip(tree, tmp_path):
    source = tree("lsmdc/captions")
    (file,) = source.glob("videos/0001_test_Film/*.avi")
    file.unlink()
    for number, name in enumerate(("9.jpg", "10.jpg", "11.png")):
        content = raw_trees.png(0) if name.endswith("png") else raw_trees.jpeg(3 * number)
        raw_trees.put(source / "frames/0001_test_Film" / file.stem / name, content)
    prepare("lsmdc/captions", tmp_path / "out", source=str(source), splits=["test"])
    clip = records("lsmdc/captions", "test", tmp_path / "out")[0]
    assert raw_trees.jpeg(0) in clip["media"] and raw_trees.jpeg(3) in clip["media"]
    frames = decode_frames(clip["media"], 3)
    assert frames.shape == (3, 24, 32, 3) and abs(int(frames[1, 5, 5, 0]) - 180) < 6  # the second frame by number
    assert len(open_source("lsmdc/captions", "test", tmp_path / "out")) == 2


@pytest.mark.parametrize("layout", ["json", "pairs"])
def test_other_forms_of_the_same_captions(tree, tmp_path, layout):
    source = tree("sbu/captions")
    prepare("sbu/captions", tmp_path / "one", source=str(source))
    urls, captions = (
        (source / f"SBU_captioned_photo_dataset_{part}.txt").read_text().splitlines() for part in ("urls", "captions")
    )
    (source / "SBU_captioned_photo_dataset_urls.txt").unlink()
    if layout == "json":
        raw_trees.put(source / "sbu-captions-all.json", {"image_urls": urls, "captions": captions})
    else:
        pairs = [[f"x/{url.split('/')[-1]}", c] for url, c in zip(urls, captions, strict=True)]
        raw_trees.put(source / "annot.json", pairs)
    prepare("sbu/captions", tmp_path / "other", source=str(source))
    one, other = (records("sbu/captions", "train", tmp_path / kind) for kind in ("one", "other"))
    assert one == other


def test_lists_of_conceptual_captions(tmp_path):
    tree = tmp_path / "tree"
    for split, part in (("train", "train"), ("val", "val")):
        raw_trees.put(tree / f"{split}_annot.json", [["a/1.jpg", "one"], ["b/2.jpg", "zwei"], ["c/3.jpg", "gone"]])
        raw_trees.put(tree / f"images_{part}/a/1.jpg", raw_trees.jpeg(0))
        raw_trees.put(tree / f"images_{part}/b/2.jpg", raw_trees.jpeg(1))
    prepare("conceptual_captions/captions", tmp_path / "out", source=str(tree), skip_broken=True)
    found = records("conceptual_captions/captions", "validation", tmp_path / "out")
    assert [(record["id"], record["captions"]) for record in found] == [("1.jpg", ["one"]), ("2.jpg", ["zwei"])]


def test_training_on_a_public_set(trees, tmp_path):
    prepare("nlvr2/statements", tmp_path, source=str(trees["nlvr2/statements"][0]))
    data = default_config().data
    data.update(dir=str(tmp_path), text_length=LENGTH, threads=1, prefetch=2)
    data.images.update(datasets=("nlvr2/statements",), batch_size=4, image_size=16)
    batch = next(iter(task_dataset(data, seed=0, tokenizer=Letters())))
    assert sorted(batch["example_id"].tolist()) == [0, 1, 2, 3] and set(batch["label"].tolist()) == {0, 1}


# ---- bad input ----


def reasons(name, source, tmp_path, **options):
    with pytest.raises(BrokenRecordsError) as error:
        prepare(name, tmp_path / "out", source=str(source), **options)
    listed = (tmp_path / "out" / name / LEFT_OUT_FILE).read_text().splitlines()
    assert [json.loads(line)["reason"] for line in listed] == [problem.reason for problem in error.value.problems]
    assert not list((tmp_path / "out" / name).glob("*.*.*"))
    return {problem.reason.replace(str(source), "TREE") for problem in error.value.problems}


def test_missing_and_broken_images_are_listed_and_can_be_left_out(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "_SHARD", {"image": 1})  # so that some shards hold nothing
    source = tree("coco/captions")
    (source / "train2014" / "COCO_train2014_000000000000.jpg").unlink()
    file = source / "val2014" / "COCO_val2014_000000000001.jpg"
    file.write_bytes(file.read_bytes()[:400])
    entries = json.loads((source / "dataset_coco.json").read_text())
    entries["images"].append(raw_trees.karpathy_entry(0, "COCO_val2014_000000000002.jpg", "train") | {"filepath": ".."})
    entries["images"].append(raw_trees.karpathy_entry(2, "COCO_val2014_000000000002.jpg", "train"))
    entries["images"].append(entries["images"][2] | {"split": "train"})
    raw_trees.put(source / "dataset_coco.json", entries)
    found = reasons("coco/captions", source, tmp_path)
    assert len(found) == 4
    with pytest.raises(BrokenRecordsError, match="nothing is left of split test"):
        (source / "val2014" / "COCO_val2014_000000000003.jpg").rename(source / "elsewhere.jpg")
        prepare("coco/captions", tmp_path / "another", source=str(source), skip_broken=True)
    (source / "elsewhere.jpg").rename(source / "val2014" / "COCO_val2014_000000000003.jpg")
    first = "train2014/COCO_train2014_000000000000.jpg"
    assert f"COCO_train2014_000000000000.jpg: no file {first} or images/{first} in TREE" in found
    assert any("COCO_val2014_000000000001.jpg: cannot decode" in reason for reason in found)
    assert any("leads out of TREE" in reason for reason in found)
    assert any(reason.startswith("no 'filepath' among: filename") for reason in found)
    folder = prepare("coco/captions", tmp_path / "out", source=str(source), skip_broken=True)
    assert [record["id"] for record in records("coco/captions", "train", tmp_path / "out")] == [
        "COCO_val2014_000000000002.jpg"
    ]
    assert len((folder.parent / LEFT_OUT_FILE).read_text().splitlines()) == 4


@pytest.mark.parametrize("name", raw_trees.TREES)
def test_a_missing_file_of_every_data_set_is_named_and_can_be_left_out(tree, tmp_path, name):
    source = tree(name)
    split = next(iter(builder_module(name.partition("/")[0]).DATASET.published))
    prepare(name, tmp_path / "whole", source=str(source), splits=[split])
    whole = records(name, split, tmp_path / "whole")
    missing = [path for path in source.rglob("*") if path.is_file() and path.read_bytes() == whole[0]["media"]]
    for path in missing:  # the splits of a miniature may have the same media
        path.unlink()
    (reason,) = reasons(name, source, tmp_path, splits=[split])
    assert reason.startswith(f"{whole[0]['id']}: no file ") and any(path.name in reason for path in missing)
    if len(whole) == 1:
        with pytest.raises(BrokenRecordsError, match=f"1 of 1 records .* nothing is left of split {split}"):
            prepare(name, tmp_path / "out", source=str(source), splits=[split], skip_broken=True)
        return
    prepare(name, tmp_path / "out", source=str(source), splits=[split], skip_broken=True)
    assert [record["id"] for record in records(name, split, tmp_path / "out")] == [r["id"] for r in whole[1:]]


def test_a_missing_split_is_named_before_anything_is_written(tree, tmp_path):
    source = tree("vqav2/questions")
    (source / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    message = "holds no v2_OpenEnded_mscoco_test2015_questions.json; docs/data.md says .*--splits leaves splits out"
    with pytest.raises(FileNotFoundError, match=message):
        prepare("vqav2/questions", tmp_path / "out", source=str(source))
    assert not (tmp_path / "out").exists()
    splits = ["train", "validation"]
    prepare("vqav2/questions", tmp_path / "out", source=str(source), splits=splits)
    with pytest.raises(ValueError, match="has no split 'test'; it has 'train', 'validation'"):
        open_source("vqav2/questions", "test", tmp_path / "out")


def test_empty_questions_and_questions_without_annotation_are_named(tree, tmp_path):
    source = tree("vqav2/questions")
    file = source / "v2_OpenEnded_mscoco_val2014_questions.json"
    questions = json.loads(file.read_text())["questions"]
    questions[0]["question"] = "  "
    questions.append({"question_id": 99, "image_id": 4, "question": "why?"})
    raw_trees.put(file, {"questions": questions})
    found = reasons("vqav2/questions", source, tmp_path, splits=["train", "validation"])
    assert "question 99 has no annotation in v2_mscoco_val2014_annotations.json" in found
    assert "8, question 30: empty question" in found


def test_question_ids_are_whole_numbers_of_any_size_and_each_occurs_once(tree, tmp_path):
    source = tree("vqav2/questions")
    file, options = source / "v2_OpenEnded_mscoco_test2015_questions.json", {"splits": ["test"]}
    entry = {"question_id": 2**40, "image_id": 5, "question": "where?"}
    raw_trees.put(file, {"questions": [entry]})
    prepare("vqav2/questions", tmp_path / "large", source=str(source), **options)
    stream = default_config().data.images
    choices = {"data_dir": str(tmp_path / "large"), "text_length": LENGTH, "tokenizer": Letters(), "batch_size": 4}
    test = task_evaluation_set(stream, ("vqav2/questions",), "test", **choices)
    assert test.text_id(0) == str(2**40) and next(test.batches())["weight"].sum() == 1
    wrong = [{"question_id": -5}, {"question_id": True}, {"image_id": [1]}, {"image_id": 5.0}, {}]
    raw_trees.put(file, {"questions": [entry, *(entry | change for change in wrong)]})
    found = reasons("vqav2/questions", source, tmp_path, **options)
    assert f"question_id '{2**40}' is that of TREE/{file.name}, line 1 too" in found
    assert {reason for reason in found if "whole number" in reason} == {
        "question_id -5, which is no whole number from 0 on",
        "question_id True, which is no whole number from 0 on",
    }
    assert any(reason.startswith("image_id is a list") for reason in found) and len(found) == 5


def test_an_annotation_of_an_annotated_question_is_named(tree, tmp_path):
    source = tree("vqav2/questions")
    file = source / "v2_mscoco_val2014_annotations.json"
    annotations = json.loads(file.read_text())["annotations"]
    raw_trees.put(file, {"annotations": [*annotations, annotations[0]]})
    with pytest.raises(ValueError, match="val2014_annotations.json: an annotation has question_id '30' is that of"):
        prepare("vqav2/questions", tmp_path / "out", source=str(source))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentences": null}', "'sentences' in .*MSRVTT_data.json is a JSON NoneType, not a list of entries"),
        ('{"sentences": ' + "[" * 100_000 + "]" * 100_000 + "}", "MSRVTT_data.json is no JSON: maximum recursion"),
    ],
    ids=["null", "deep"],
)
def test_annotations_that_are_no_list_are_named(tree, tmp_path, content, message):
    source = tree("msrvtt/captions")
    raw_trees.put(source / "MSRVTT_data.json", content)
    with pytest.raises(ValueError, match=message):
        prepare("msrvtt/captions", tmp_path / "out", source=str(source))


@pytest.mark.parametrize("lines", [3, 70_000])  # within what csv takes for a field, and beyond
def test_a_quote_that_is_left_open_is_no_caption(lines, tree, tmp_path):
    source = tree("msrvtt/captions")
    table = 'key,vid_key,video_id,sentence\nret0,msr2,video2,"' + "x\n" * lines
    raw_trees.put(source / "MSRVTT_JSFUSION_test.csv", table)
    with pytest.raises(ValueError, match=r"records? cannot be used; nothing is left of split test"):
        prepare("msrvtt/captions", tmp_path / "out", source=str(source), splits=["test"])


def test_answers_outside_the_vocabulary_are_counted(tree, tmp_path):
    source, name = str(tree("vqav2/questions")), "vqav2/questions"
    options = {"source": source, "splits": ["train"], "answers_at_least": 9}  # no answer of a miniature is that common
    with pytest.raises(
        ValueError, match=r"split train but what is left out \(\d questions: none of their .* at least 9"
    ):
        prepare(name, tmp_path / "out", **options)
    prepare(name, tmp_path / "out", **{**options, "answers_at_least": 3})
    assert class_names((name,), str(tmp_path / "out")) == ("cat",)
    with pytest.raises(ValueError, match="answers_at_least=0"):
        prepare(name, tmp_path / "again", **{**options, "answers_at_least": 0})


def test_a_label_that_is_none_is_named(tree, tmp_path):
    for name, split, file, wrong in (
        ("nlvr2/statements", "dev", "data/dev.json", ('"True"', '"Maybe"', "label 'Maybe' is neither True nor False")),
        (
            "snli_ve/pairs",
            "test",
            "snli_ve_test.jsonl",
            ('"neutral"', '"-"', "gold_label '-' is none of contradiction"),
        ),
    ):
        source = tree(name)
        raw_trees.put(source / file, (source / file).read_text().replace(*wrong[:2], 1) + "{broken\n")
        found = reasons(name, source, tmp_path, splits=[split])
        assert len(found) == 2
        assert any(reason.startswith(wrong[2]) for reason in found)
        assert any(reason.startswith("malformed JSON") for reason in found)


def test_a_clip_without_a_file_or_a_sentence_is_named(tree, tmp_path):
    source = tree("msrvtt/captions")
    (source / "videos/all/video2.mp4").unlink()
    raw_trees.put(source / "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo9\n")
    raw_trees.put(source / "videos/all/video0.mp4", raw_trees.jpeg(0))
    found = reasons("msrvtt/captions", source, tmp_path)
    assert "MSRVTT_data.json has no sentence of 'video9'" in found
    assert "video2: no file videos/all/video2.mp4 or videos/video2.mp4 in TREE" in found
    assert any(reason.startswith("video0: no video file of a known kind") for reason in found)


def test_files_of_another_kind_are_errors_that_say_so(tree, tmp_path, trees):
    source = tree("coco/captions")
    (source / "dataset_coco.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="dataset_coco.json is no JSON: .*; it may be cut off"):
        prepare("coco/captions", tmp_path / "out", source=str(source))
    raw_trees.put(source / "dataset_coco.json", {"pictures": []})
    with pytest.raises(ValueError, match="has no 'images'; is it the owner's file"):
        prepare("coco/captions", tmp_path / "out", source=str(source))
    with pytest.raises(FileNotFoundError, match="holds no vqav2_train.arrow"):
        prepare("vqav2/questions", tmp_path / "out", source=str(trees["coco/captions"][1]), splits=["train"])
    raw_trees.arrow(tmp_path / "other" / "vg.arrow", image=[b""], text=["x"])
    with pytest.raises(ValueError, match="vg.arrow has no column caption; it has image, text"):
        prepare("visual_genome/captions", tmp_path / "out", source=str(tmp_path / "other"))
    for options, message in (
        ({}, "name the folder of its files with --source"),
        ({"source": str(source), "splits": ["dev"]}, "coco has no split dev; it has train, validation, test"),
        ({"source": str(source), "workers": 0}, "workers=0"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepare("coco/captions", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="coco has the config 'captions', not 'questions'"):
        prepare("coco/questions", tmp_path / "out", source=str(source))


# ---- resuming ----


def test_finished_splits_are_not_made_again(tree, tmp_path, monkeypatch):
    name, out = "flickr30k/captions", tmp_path / "out"
    source = tree(name)
    missing = source / "flickr30k-images" / "1002.jpg"
    content = missing.read_bytes()
    missing.unlink()
    options = {"source": str(source), "workers": 1}
    with pytest.raises(BrokenRecordsError):
        prepare_dataset(name, out, overwrite=False, options=options)
    assert [path.name for path in sorted((out / name).iterdir())] == [LEFT_OUT_FILE]
    missing.write_bytes(content)
    for number in (0, 1):
        (source / "flickr30k-images" / f"{1000 + number}.jpg").unlink()  # train and validation are in the shards by now
    folder, written = prepare_dataset(name, out, overwrite=False, options=options)
    assert written and [len(open_source(name, split, out)) for split in ("train", "validation", "test")] == [1, 1, 1]
    assert sorted(path.name for path in out.iterdir()) == ["flickr30k"]
    assert not (folder.parent / LEFT_OUT_FILE).exists()
    assert prepare_dataset(name, out, overwrite=False, options=options) == (folder, False)


def test_an_interrupted_preparation_goes_on_with_the_split_it_was_at(trees, tmp_path, monkeypatch):
    name, out, options = "flickr30k/captions", tmp_path / "out", {"source": str(trees["flickr30k/captions"][0])}
    seen, load = [], raw.load

    def interrupted(dataset, item):
        seen.append(item.id)
        if seen.count("1001.jpg") == 1 and item.id == "1001.jpg":
            raise KeyboardInterrupt
        return load(dataset, item)

    monkeypatch.setattr(raw, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(name, out, overwrite=False, options=options)
    assert not (out / "flickr30k").exists()
    prepare_dataset(name, out, overwrite=False, options=options)
    assert seen == ["1000.jpg", "1001.jpg", "1001.jpg", "1002.jpg"]
    assert [len(open_source(name, split, out)) for split in ("train", "validation", "test")] == [1, 1, 1]


def test_splits_that_were_being_put_together_are_not_lost(trees, tmp_path, monkeypatch):
    name, out, options = "flickr30k/captions", tmp_path / "out", {"source": str(trees["flickr30k/captions"][0])}
    link, loaded, load = raw._link, [], raw.load

    def interrupted(file, folder):
        if "validation" in file.name:
            raise KeyboardInterrupt
        link(file, folder)

    monkeypatch.setattr(raw, "load", lambda dataset, item: loaded.append(item.id) or load(dataset, item))
    monkeypatch.setattr(raw, "_link", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(name, out, overwrite=False, options=options)
    monkeypatch.setattr(raw, "_link", link)
    prepare_dataset(name, out, overwrite=False, options=options)
    assert len(loaded) == 3 and [path.name for path in out.iterdir()] == ["flickr30k"]
    assert [len(open_source(name, split, out)) for split in ("train", "validation", "test")] == [1, 1, 1]


def test_a_folder_without_its_description_is_made_again(trees, tmp_path):
    name, options = "flickr30k/captions", {"source": str(trees["flickr30k/captions"][0]), "splits": ["test"]}
    folder = prepare(name, tmp_path, **options)
    (folder / "dataset_info.json").unlink()
    (folder / "remains").touch()
    assert prepare(name, tmp_path, **options) == folder and not (folder / "remains").exists()
    assert len(open_source(name, "test", tmp_path)) == 1


def test_options_that_change_no_shard_are_no_other_options(trees, tmp_path, monkeypatch):
    name, source = "flickr30k/captions", trees["flickr30k/captions"][0]
    folder = prepare(name, tmp_path, source=str(source), splits=["test"], workers=1)
    monkeypatch.chdir(source.parent)
    assert prepare(name, tmp_path, source=f"{source.name}/", splits=["test"], workers=3) == folder
    old = {"source": f"{source}/", "splits": ["test"], "workers": 4}  # as earlier versions noted it
    (folder / "prepared_with.json").write_text(json.dumps(old, indent=2))
    assert prepare(name, tmp_path, source=str(source), splits=["test"]) == folder
    with pytest.raises(ValueError, match="was prepared with other options"):
        prepare(name, tmp_path, source=str(source), splits=["train"])
