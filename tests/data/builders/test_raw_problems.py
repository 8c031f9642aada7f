"""What preparing a public data set says of bad files, and what of it is not done twice."""

from __future__ import annotations

import json

import pytest
import raw_trees
from batches import Letters

from scl_jax.config import default_config
from scl_jax.data.builders import builder_module, open_source, prepare, raw
from scl_jax.data.builders.problems import LEFT_OUT_FILE, BrokenRecordsError
from scl_jax.data.prepare import prepare_dataset
from scl_jax.data.task_pipeline import class_names, task_evaluation_set

LENGTH = 40


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
    assert [record["id"] for record in raw_trees.records("coco/captions", "train", tmp_path / "out")] == [
        "COCO_val2014_000000000002.jpg"
    ]
    assert len((folder.parent / LEFT_OUT_FILE).read_text().splitlines()) == 4


@pytest.mark.parametrize("name", raw_trees.TREES)
def test_a_missing_file_of_every_data_set_is_named_and_can_be_left_out(tree, tmp_path, name):
    source = tree(name)
    split = next(iter(builder_module(name.partition("/")[0]).DATASET.published))
    prepare(name, tmp_path / "whole", source=str(source), splits=[split])
    whole = raw_trees.records(name, split, tmp_path / "whole")
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
    assert [record["id"] for record in raw_trees.records(name, split, tmp_path / "out")] == [r["id"] for r in whole[1:]]


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
