"""Losses of classifiers against plain NumPy; padding rows change nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.objectives.classification import answer_loss, answer_score, class_correct, class_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (6, 5)).astype(np.float32)
SCORES = np.where(RNG.random((6, 5)) < 0.3, RNG.choice([0.3, 0.6, 1.0], (6, 5)), 0).astype(np.float32)
LABELS = RNG.integers(0, 5, 6)
WEIGHT = np.array([1, 1, 0, 1, 1, 0], np.float32)


def test_answers_binary_cross_entropy_is_summed_over_answers_and_averaged_over_rows():
    p = 1 / (1 + np.exp(-LOGITS.astype(float)))
    terms = -(SCORES * np.log(p) + (1 - SCORES) * np.log(1 - p)).sum(axis=1)
    loss = answer_loss(jnp.asarray(LOGITS), jnp.asarray(SCORES), jnp.asarray(WEIGHT))
    assert float(loss.mean()) == pytest.approx(terms[WEIGHT > 0].mean(), rel=1e-6)


def test_an_answer_earns_its_soft_score():
    score = answer_score(jnp.asarray(LOGITS), jnp.asarray(SCORES), jnp.asarray(WEIGHT))
    expected = SCORES[np.arange(6), LOGITS.argmax(axis=1)][WEIGHT > 0].mean()
    assert float(score.mean()) == pytest.approx(expected)


def test_cross_entropy_and_accuracy_of_classes():
    shifted = LOGITS.astype(float) - LOGITS.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    terms = -log_probability[np.arange(6), LABELS]
    arguments = jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.asarray(WEIGHT)
    assert float(class_loss(*arguments).mean()) == pytest.approx(terms[WEIGHT > 0].mean(), rel=1e-6)
    right = (LOGITS.argmax(axis=1) == LABELS)[WEIGHT > 0].mean()
    assert float(class_correct(*arguments).mean()) == pytest.approx(right)


def test_classes_with_the_same_highest_logit_share_the_point():
    logits = jnp.asarray([[1.0, 1.0, 0.0, -jnp.inf], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 3.0, 3.0], [3.0, 1.0, 0.0, 0.0]])
    correct = class_correct(logits, jnp.asarray([0, 0, 1, 0]), jnp.ones(4))
    assert float(correct.total) == pytest.approx(0.5 + 0.25 + 0.0 + 1.0)


def test_an_unknown_label_does_not_count():
    labels = jnp.asarray(LABELS).at[1].set(-1)
    known = jnp.asarray(WEIGHT).at[1].set(0)
    for function in (class_loss, class_correct):
        one, other = (
            function(jnp.asarray(LOGITS), *rest)
            for rest in ((labels, jnp.asarray(WEIGHT)), (jnp.asarray(LABELS), known))
        )
        assert float(one.mean()) == float(other.mean()) and float(one.weight) == 3


def test_a_class_that_a_row_does_not_have_takes_no_part():
    few = class_loss(jnp.asarray(LOGITS[:, :3]), jnp.zeros(6, jnp.int32), jnp.ones(6))
    masked = jnp.asarray(LOGITS).at[:, 3:].set(-jnp.inf)
    many = class_loss(masked, jnp.zeros(6, jnp.int32), jnp.ones(6))
    assert float(many.mean()) == pytest.approx(float(few.mean()), rel=1e-6)
