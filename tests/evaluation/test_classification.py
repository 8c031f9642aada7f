"""Scores of classifiers against examples counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scl_jax.evaluation.classification import ClassificationEvaluation
from scl_jax.models import parameters
from scl_jax.tasks.task import ClassifierTask
from scl_jax.training.sharding import make_mesh

CLASSES = ("yes", "no", "2")


class Nothing(nnx.Module):
    """A network of one number, which is not used."""

    def __init__(self):
        self.number = nnx.Param(jnp.zeros([]))


class Told(ClassifierTask):
    """Chooses the class that the first pixel of an image names."""

    loss = "vqa"

    def logits(self, model, batch, key=None):
        return jax.nn.one_hot(batch.pixels[:, 0, 0, 0, 0].astype(jnp.int32), 3)


class Shown:
    """An evaluation set of these choices, in batches of two, the last one padded."""

    classes = CLASSES

    def __init__(self, choices, people=(), **targets):
        self.num_examples, self._choices, self._people, self._targets = len(choices), choices, people, targets

    def batches(self):
        for first in range(0, self.num_examples, 2):
            rows = np.minimum(np.arange(first, first + 2), self.num_examples - 1)
            pixels = np.zeros((2, 1, 1, 1, 3), np.uint8)
            pixels[:, 0, 0, 0, 0] = np.asarray(self._choices)[rows]
            text = np.zeros((2, 3), np.int32)
            yield {
                "pixels": pixels, "token_ids": text, "token_mask": text > 0, "word_ids": text, "item_id": rows,
                "weight": (np.arange(first, first + 2) < self.num_examples).astype(np.float32), "example_id": rows,
                **{name: np.asarray(values)[rows] for name, values in self._targets.items()},
            }  # fmt: skip

    def text_id(self, example):
        return str(100 + example)

    def answers(self, example):
        return list(self._people[example]) if self._people else []


def evaluate(examples, classes=CLASSES):
    graph, params = parameters.split(Nothing())
    mesh = make_mesh(devices=jax.devices()[:1])
    evaluation = ClassificationEvaluation(graph, Told(), mesh, {"images": examples}, classes=classes)
    metrics, predictions = evaluation(params)
    return metrics, predictions["images"]


def test_accuracy_and_majority_leave_out_unknown_labels():
    metrics, predictions = evaluate(Shown([0, 1, 2, 0, 0], label=[0, 1, 1, -1, 1]))
    assert metrics == {"vqa/accuracy": 0.5, "vqa/majority": 0.75, "vqa/examples": 5}
    assert predictions.ids == ["100", "101", "102", "103", "104"]
    assert predictions.classes == ["yes", "no", "2", "yes", "yes"]


def test_the_score_of_answers_is_the_official_one():
    """One person of ten agrees: 0.3; two: 0.6 …; "two" is "2"."""
    people = [["yes"] + ["no"] * 9, ["no"] * 10, ["two"] * 2 + ["3"] * 8]
    scores = np.array([[0.3, 1, 0], [0, 1, 0], [0, 0, 0.6]], np.float32)
    metrics, _ = evaluate(Shown([0, 1, 2], people, answer_scores=scores))
    assert metrics["vqa/score"] == pytest.approx((0.3 + 1.0 + 0.6) / 3)
    assert metrics["vqa/majority"] == pytest.approx(2 / 3) and metrics["vqa/in_vocabulary"] == 1


def test_padding_makes_no_majority():
    """The row that fills the last batch repeats the last question."""
    metrics, _ = evaluate(Shown([0, 1, 2], answer_scores=np.eye(3, dtype=np.float32)))
    assert metrics["vqa/majority"] == pytest.approx(1 / 3)


def test_where_some_answers_of_people_are_missing_soft_targets_are_the_score():
    scores = np.array([[0.9, 0, 0], [0.3, 0, 0]], np.float32)
    metrics, _ = evaluate(Shown([0, 0], [["yes"] * 10, []], answer_scores=scores))
    assert metrics["vqa/score"] == pytest.approx(0.6)


def test_questions_that_the_vocabulary_cannot_answer_are_counted():
    scores = np.array([[1, 0, 0], [0, 0, 0]], np.float32)
    metrics, _ = evaluate(Shown([0, 1], answer_scores=scores))
    assert metrics["vqa/in_vocabulary"] == 0.5 and metrics["vqa/score"] == 0.5


@pytest.mark.parametrize("targets", [{}, {"label": [-1, -1]}, {"answer_scores": np.zeros((2, 3), np.float32)}])
def test_a_split_whose_targets_are_not_published_gives_predictions_only(targets):
    metrics, predictions = evaluate(Shown([1, 2], **targets))
    assert metrics == {"vqa/examples": 2} and predictions.classes == ["no", "2"]


def test_an_empty_answer_is_handed_in_and_scored_as_an_article():
    examples = Shown([0, 0], [["a"] * 10, ["a"] * 5 + ["the"] * 5], answer_scores=np.eye(3, dtype=np.float32)[[0, 0]])
    examples.classes = ("", "no", "2")
    metrics, predictions = evaluate(examples, examples.classes)
    assert predictions.classes == ["a", "a"] and metrics["vqa/score"] == 1


def test_other_classes_than_those_of_training_are_an_error():
    examples = Shown([0])
    examples.classes = ("no", "yes", "2")
    with pytest.raises(ValueError, match="have 3 classes and not the 3 of training, in their order"):
        evaluate(examples)
