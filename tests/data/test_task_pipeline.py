"""Facts about the batches of downstream tasks: every text once, its own targets, both images, exact resumption."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from batches import Letters, assert_same, take, text_of

from scl_jax.config import default_config
from scl_jax.data.builders import open_source, prepare, toy_tasks
from scl_jax.data.pipeline import TrainExample
from scl_jax.data.task_pipeline import Example, class_names, task_dataset, task_evaluation_set

LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for config in ("images", "questions", "statements", "entailment"):
        prepare(f"toy_world/{config}", folder, train=6, validation=5, test=2)
    return folder


def data_of(folder, *names, batch_size=4):
    data = default_config().data
    data.update(dir=str(folder), text_length=LENGTH, threads=2, prefetch=2)
    data.images.update(datasets=names, batch_size=batch_size, image_size=32, rand_augment=(2, 9), flip="never")
    data.images.crop_scale = (0.9, 1.0)
    return data


def batches(data, rows_of=range):
    return iter(task_dataset(data, seed=0, tokenizer=Letters(), rows_of=rows_of))


def evaluation(data, name, split="validation", batch_size=4, **options):
    settings = {"data_dir": data.dir, "text_length": LENGTH, "tokenizer": Letters(), "batch_size": batch_size}
    return task_evaluation_set(data.images, (name,), split, **settings, **options)


def texts(folder, name, split):
    source = open_source(name, split, folder)
    records = [source[index] for index in range(len(source))]
    return [(record, number) for record in records for number in range(len(record["captions"]))]


COMMON = {"pixels", "token_ids", "token_mask", "word_ids", "weight", "item_id", "example_id"}
FIELDS = {
    "toy_world/images": set(),
    "toy_world/questions": {"answer_scores"},
    "toy_world/statements": {"label", "second_pixels"},
    "toy_world/entailment": {"label"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_training_and_evaluation_batches_have_the_fields_of_their_task(folder, name):
    data = data_of(folder, name)
    batch, shown = next(batches(data)), next(evaluation(data, name).batches())
    assert batch.keys() == COMMON | FIELDS[name] | {"stream"} and shown.keys() == COMMON | FIELDS[name]
    for fields in (batch, shown):
        assert fields["pixels"].shape == (4, 1, 32, 32, 3) and fields["pixels"].dtype == np.uint8
        if name == "toy_world/statements":
            assert fields["second_pixels"].shape == (4, 1, 32, 32, 3)
            assert (fields["second_pixels"] != fields["pixels"]).any()
        if name == "toy_world/questions":
            assert fields["answer_scores"].shape == (4, 23) and fields["answer_scores"].dtype == np.float32
        for key in ("label", "example_id", "item_id"):
            assert key not in fields or (fields[key].shape, fields[key].dtype) == ((4,), np.int32)


@pytest.mark.parametrize("name", FIELDS)
def test_an_epoch_shows_every_text_once_with_its_own_target(folder, name):
    expected = texts(folder, name, "train")
    taken = take(batches(data_of(folder, name, batch_size=len(expected))), 2)
    for batch in taken:
        assert sorted(batch["example_id"].tolist()) == list(range(len(expected)))
        check_rows(batch, expected)
    assert taken[0]["example_id"].tolist() != taken[1]["example_id"].tolist()


def check_rows(batch, expected):
    for row in np.flatnonzero(batch["weight"]):
        record, number = expected[batch["example_id"][row]]
        assert text_of(batch["token_ids"][row]) == record["captions"][number][:LENGTH]
        if "label" in batch:
            assert batch["label"][row] == record["labels"][number]
        if "answer_scores" in batch:
            (answer,) = np.flatnonzero(batch["answer_scores"][row])
            assert toy_tasks.ANSWERS[answer] == record["answers"][10 * number]


@pytest.mark.parametrize("name", FIELDS)
def test_evaluation_shows_every_text_once_in_order_and_pads(folder, name):
    gallery, expected = evaluation(data_of(folder, name), name), texts(folder, name, "validation")
    shown = list(gallery.batches())
    ids, weight = (np.concatenate([batch[key] for batch in shown]) for key in ("example_id", "weight"))
    assert gallery.num_examples == weight.sum() == len(expected)
    assert ids[weight == 1].tolist() == list(range(len(expected))) and (ids[weight == 0] == -1).all()
    for batch in shown:
        check_rows(batch, expected)
        assert (batch["item_id"][batch["weight"] == 0] == -1).all()
    for example in (0, len(expected) - 1):
        record, number = expected[example]
        assert gallery.text(example) == record["captions"][number]
        assert (
            gallery.text_id(example)
            == record.get("text_ids", [str(i) for i in range(99)])[number if "text_ids" in record else example]
        )
        assert gallery.answers(example) == record.get("answers", [])[10 * number : 10 * number + 10]


def test_a_smaller_set_is_spread_over_the_split(folder):
    name = "toy_world/questions"
    gallery, whole = (evaluation(data_of(folder, name), name, max_items=size) for size in (5, 0))
    assert gallery.num_examples == 5
    step = whole.num_examples / 5
    assert [gallery.text_id(i) for i in range(5)] == [whole.text_id(int(i * step)) for i in range(5)]


def test_resumption_and_processes_are_exact(folder):
    data = data_of(folder, "toy_world/statements")
    whole = batches(data)
    take(whole, 2)
    state = whole.get_state()
    assert state == {"next_index": 2}
    expected = take(whole, 3)
    again = batches(data)
    again.set_state(state)
    assert_same(take(again, 3), expected)
    halves = [batches(data, rows_of=lambda size, p=p: range(p * size // 2, (p + 1) * size // 2)) for p in range(2)]
    for half in halves:
        half.set_state(state)
    for batch, *parts in zip(expected, *(take(half, 3) for half in halves), strict=True):
        for key in batch.keys() - {"stream"}:
            np.testing.assert_array_equal(batch[key], np.concatenate([part[key] for part in parts]))


def test_the_images_of_an_example_are_augmented_each_by_its_own_draw(folder, monkeypatch):
    monkeypatch.setattr("scl_jax.data.builders.Source.__getitem__", same_images(folder))
    batch = next(batches(data_of(folder, "toy_world/statements")))
    assert (batch["pixels"] != batch["second_pixels"]).any()
    shown = next(evaluation(data_of(folder, "toy_world/statements"), "toy_world/statements").batches())
    np.testing.assert_array_equal(shown["pixels"], shown["second_pixels"])


def test_both_images_of_a_statement_are_trained_on_under_its_text(folder, monkeypatch):
    seen, original = set(), TrainExample.pixels

    def pixels(make, record, media, caption, rng):
        seen.add((bytes(media), caption))
        return original(make, record, media, caption, rng)

    monkeypatch.setattr(TrainExample, "pixels", pixels)
    expected = texts(folder, "toy_world/statements", "train")
    next(batches(data_of(folder, "toy_world/statements", batch_size=len(expected))))
    for record, number in expected:
        for media in ("media", "second_media"):
            assert (bytes(record[media]), record["captions"][number]) in seen


def test_soft_scores_are_those_of_the_question():
    answers = {"answer_counts": [1, 2], "answer_labels": [3, 0, 2], "answer_scores": [0.3, 1.0, 0.6]}
    record = SimpleNamespace(extra={name: np.array(values) for name, values in answers.items()})
    scores = [Example(record, number, 0).targets(4)["answer_scores"] for number in (0, 1)]
    np.testing.assert_allclose(scores, [[0, 0, 0, 0.3], [1, 0, 0.6, 0]], rtol=1e-6)


def same_images(folder):
    record = open_source("toy_world/statements", "train", folder)[0]
    return lambda source, index: {**record, "second_media": record["media"]}


def test_classes_of_a_stream_must_agree(folder):
    assert class_names(("toy_world/entailment",), str(folder)) == ("contradiction", "neutral", "entailment")
    assert class_names(("toy_world/images",), str(folder)) == ()
    with pytest.raises(ValueError, match="toy_world/questions 23, toy_world/statements 2"):
        task_dataset(data_of(folder, "toy_world/questions", "toy_world/statements"), seed=0, tokenizer=Letters())
