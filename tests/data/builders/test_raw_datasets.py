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
from scl_jax.data.builders import builder_module, open_source, prepare
from scl_jax.data.task_pipeline import class_names, task_dataset, task_evaluation_set
from scl_jax.data.video import decode_frames

LENGTH = 40
VIDEOS = ("webvid/captions", "msrvtt/captions", "lsmdc/captions")
UNNAMED_IN_ARROW = {"snli_ve/pairs": ("id", "text_ids"), "vqav2/questions": ("answers",)}


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
        ours, theirs = (raw_trees.records(name, split, tmp_path / kind) for kind in ("tree", "arrow"))
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
    found = [record for split in splits for record in raw_trees.records(name, split, tmp_path)]
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
    train = raw_trees.records("coco/captions", "train", tmp_path)
    assert [record["captions"] for record in train] == [raw_trees.CAPTIONS[0], raw_trees.CAPTIONS[1]]
    assert [record["media"] for record in train] == [raw_trees.jpeg(0), raw_trees.jpeg(1)]
    assert train[1]["id"] == "COCO_val2014_000000000001.jpg"
    assert open_source("coco/captions", "train", tmp_path).text_counts() == [3, 1]


def test_questions_get_soft_scores_of_the_vocabulary_of_train_and_val(trees, tmp_path):
    name = "vqav2/questions"
    folder = prepare(name, tmp_path, source=str(trees[name][0]))
    assert class_names((name,), str(tmp_path)) == ("cat", "2", "yes")
    train = batch_of(name, tmp_path, "train")
    ids = [text_id for record in raw_trees.records(name, "train", tmp_path) for text_id in record["text_ids"]]
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
        assert raw_trees.records(name, split, tmp_path)[0]["text_ids"] == ["50"] and not test["answer_scores"].any()


def test_statements_keep_their_identifiers_and_both_images(trees, tmp_path):
    prepare("nlvr2/statements", tmp_path, source=str(trees["nlvr2/statements"][0]))
    (first, second) = raw_trees.records("nlvr2/statements", "dev", tmp_path)
    assert first["text_ids"] == ["dev-7-0-0", "dev-7-0-1", "dev-7-0-2"] and first["labels"].tolist() == [1, 0, 1]
    assert (second["media"], second["second_media"]) == (raw_trees.png(1), raw_trees.png(6))


def test_hypotheses_keep_their_pairs_and_labels(trees, tmp_path):
    prepare("snli_ve/pairs", tmp_path, source=str(trees["snli_ve/pairs"][0]))
    first = raw_trees.records("snli_ve/pairs", "validation", tmp_path)[0]
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
    clip = raw_trees.records("lsmdc/captions", "test", tmp_path / "out")[0]
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
    one, other = (raw_trees.records("sbu/captions", "train", tmp_path / kind) for kind in ("one", "other"))
    assert one == other


def test_lists_of_conceptual_captions(tmp_path):
    tree = tmp_path / "tree"
    for split, part in (("train", "train"), ("val", "val")):
        raw_trees.put(tree / f"{split}_annot.json", [["a/1.jpg", "one"], ["b/2.jpg", "zwei"], ["c/3.jpg", "gone"]])
        raw_trees.put(tree / f"images_{part}/a/1.jpg", raw_trees.jpeg(0))
        raw_trees.put(tree / f"images_{part}/b/2.jpg", raw_trees.jpeg(1))
    prepare("conceptual_captions/captions", tmp_path / "out", source=str(tree), skip_broken=True)
    found = raw_trees.records("conceptual_captions/captions", "validation", tmp_path / "out")
    assert [(record["id"], record["captions"]) for record in found] == [("1.jpg", ["one"]), ("2.jpg", ["zwei"])]


def test_training_on_a_public_set(trees, tmp_path):
    prepare("nlvr2/statements", tmp_path, source=str(trees["nlvr2/statements"][0]))
    data = default_config().data
    data.update(dir=str(tmp_path), text_length=LENGTH, threads=1, prefetch=2)
    data.images.update(datasets=("nlvr2/statements",), batch_size=4, image_size=16)
    batch = next(iter(task_dataset(data, seed=0, tokenizer=Letters())))
    assert sorted(batch["example_id"].tolist()) == [0, 1, 2, 3] and set(batch["label"].tolist()) == {0, 1}
