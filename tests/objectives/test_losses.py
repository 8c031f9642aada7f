"""Every loss equals its definition in METHOD section 4, written out as loops in float64.

Axes: B batch, F frames, E D width, T slots, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.objectives.contrastive import contrastive_loss, info_nce, number_of_parts
from scl_jax.objectives.global_completion import global_text_loss, global_vision_loss
from scl_jax.objectives.local_completion import local_text_loss, local_vision_loss
from scl_jax.objectives.masked_language import masked_language_correct, masked_language_loss
from scl_jax.objectives.matching import matching_correct, matching_loss

TEMPERATURE = 0.03  # of all completion losses
RTOL = 2e-5


def unit64(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=axis, keepdims=True), 1e-8)


def log_softmax64(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def info_nce64(anchors: np.ndarray, targets: np.ndarray, temperature: float) -> list[float]:
    """-log softmax_row(S/t)_ii - log softmax_col(S/t)_ii of every row i."""
    logits = anchors @ targets.T / temperature
    return [-log_softmax64(logits[i])[i] - log_softmax64(logits[:, i])[i] for i in range(len(logits))]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def f32(x) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape)


def test_info_nce_is_the_sum_of_both_directions():
    x, y = unit64(random(6, 8)), unit64(random(6, 8, seed=1))
    loss = info_nce(f32(x), f32(y), 0.07, ones(6))
    assert float(loss.weight) == 6
    np.testing.assert_allclose(loss.mean(), np.mean(info_nce64(x, y, 0.07)), rtol=RTOL)
    weight = np.arange(1, 7) / 2
    weighed = info_nce(f32(x), f32(y), 0.07, f32(weight))
    np.testing.assert_allclose(weighed.mean(), np.average(info_nce64(x, y, 0.07), weights=weight), rtol=RTOL)


@pytest.mark.parametrize("shape", [(12,), (2, 12)])
@pytest.mark.parametrize("at_once", [1, 50, 80])
def test_info_nce_in_parts_is_that_in_one_piece(shape, at_once):
    """Loss and gradients in float64, with padding, also where a whole part is padding."""
    with jax.enable_x64(True):
        x, y = (jnp.asarray(unit64(random(*shape, 8, seed=seed))) for seed in (0, 1))
        weight = jnp.ones(shape).at[..., jnp.array([1, 4, 7, 10, 11])].set(0)

        def run(at_once: int):
            def total(x, y, temperature):
                return info_nce(x, y, temperature, weight, at_once).mean()

            return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(x, y, jnp.asarray(0.07))

        (loss, gradients), (expected, expected_gradients) = run(at_once), run(10**6)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        for ours, whole in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(ours, whole, atol=1e-12 * float(jnp.abs(whole).max()))


def test_the_number_of_parts_divides_the_rows():
    assert [number_of_parts(144, 12, n) for n in (144, 143, 50, 12, 1)] == [1, 2, 3, 12, 12]


def test_info_nce_stays_inside_each_group():
    x, y = unit64(random(3, 4, 8)), unit64(random(3, 4, 8, seed=1))
    expected = sum(sum(info_nce64(a, b, 0.07)) for a, b in zip(x, y, strict=True))
    np.testing.assert_allclose(info_nce(f32(x), f32(y), 0.07, ones(3, 4)).total, expected, rtol=RTOL)


def test_contrastive_normalises_and_divides_by_the_temperature():
    x, y = 5 * random(6, 8), 0.1 * random(6, 8, seed=1)
    loss = contrastive_loss(f32(x), f32(y), jnp.asarray(0.07), ones(6))
    np.testing.assert_allclose(loss.mean(), np.mean(info_nce64(unit64(x), unit64(y), 0.07)), rtol=RTOL)


def test_contrastive_teaches_the_temperature():
    x, y = random(6, 8), random(6, 8, seed=1)
    gradient = jax.grad(lambda t: contrastive_loss(f32(x), f32(y), t, ones(6)).mean())(jnp.asarray(0.07))
    high, low = (np.mean(info_nce64(unit64(x), unit64(y), 0.07 + step)) for step in (1e-5, -1e-5))
    np.testing.assert_allclose(gradient, (high - low) / 2e-5, rtol=1e-3)


def test_matching_is_the_cross_entropy_of_other_and_pair():
    logits, is_pair = random(5, 2), np.array([True, False, True, True, False])
    expected = np.mean([-log_softmax64(row)[int(pair)] for row, pair in zip(logits, is_pair, strict=True)])
    np.testing.assert_allclose(matching_loss(f32(logits), jnp.asarray(is_pair), ones(5)).mean(), expected, rtol=RTOL)
    right = np.mean(logits.argmax(axis=1) == is_pair)
    np.testing.assert_allclose(matching_correct(f32(logits), jnp.asarray(is_pair), ones(5)).mean(), right, rtol=RTOL)


def test_masked_language_is_the_mean_over_masked_positions_of_the_whole_batch():
    logits, labels = random(3, 4, 11), np.random.default_rng(1).integers(0, 11, (3, 4))
    weight = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])  # not a mean of the samples' means
    places = list(zip(*np.nonzero(weight), strict=True))
    expected = np.mean([-log_softmax64(logits[b, t])[labels[b, t]] for b, t in places])
    arguments = f32(logits), jnp.asarray(labels), f32(weight)
    np.testing.assert_allclose(masked_language_loss(*arguments).mean(), expected, rtol=RTOL)
    right = np.mean([logits[b, t].argmax() == labels[b, t] for b, t in places])
    np.testing.assert_allclose(masked_language_correct(*arguments).mean(), right, rtol=RTOL)


def test_global_text_compares_over_the_batch():
    x, y = random(6, 8), random(6, 8, seed=1)
    loss = global_text_loss(f32(x), f32(y), TEMPERATURE, ones(6))
    np.testing.assert_allclose(loss.mean(), np.mean(info_nce64(unit64(x), unit64(y), TEMPERATURE)), rtol=RTOL)


@pytest.mark.parametrize("frames", [1, 3])
def test_global_vision_is_the_mean_over_frames(frames):
    x, y = random(5, frames, 8), random(5, frames, 8, seed=1)
    loss = global_vision_loss(f32(x), f32(y), TEMPERATURE, ones(5))
    terms = [info_nce64(unit64(x[:, f]), unit64(y[:, f]), TEMPERATURE) for f in range(frames)]
    np.testing.assert_allclose(loss.mean(), np.mean(terms), rtol=RTOL)


def test_global_vision_as_the_reference_divides_by_the_norm_over_frames():
    x, y = random(5, 3, 8), random(5, 3, 8, seed=1)
    loss = global_vision_loss(f32(x), f32(y), TEMPERATURE, ones(5), norm_over_frames=True)
    x, y = unit64(x, axis=1), unit64(y, axis=1)
    terms = [info_nce64(x[:, f], y[:, f], TEMPERATURE) for f in range(3)]
    np.testing.assert_allclose(loss.mean(), np.mean(terms), rtol=RTOL)


@pytest.mark.parametrize("groups", [1, 2])
def test_local_text_compares_the_masked_tokens_of_a_group(groups):
    x, y = random(4, 3, 8), random(4, 3, 8, seed=1)
    valid = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    loss = local_text_loss(f32(x), f32(y), jnp.asarray(valid), ones(4), TEMPERATURE, groups)
    terms = []
    for rows in np.split(np.arange(4), groups):
        chosen = valid[rows]
        terms += info_nce64(unit64(x[rows][chosen]), unit64(y[rows][chosen]), TEMPERATURE)
    assert float(loss.weight) == len(terms) == valid.sum()
    np.testing.assert_allclose(loss.mean(), np.mean(terms), rtol=RTOL)


@pytest.mark.parametrize(("frames", "groups"), [(1, 1), (1, 2), (3, 2)])
def test_local_vision_compares_the_replaced_patches_of_a_group(frames, groups):
    """Of one frame index at a time: neighbouring frames show nearly the same patches and are no negatives."""
    x, y = random(4, frames, 3, 8), random(4, frames, 3, 8, seed=1)
    loss = local_vision_loss(f32(x), f32(y), ones(4), TEMPERATURE, groups)
    terms = []
    for rows in np.split(np.arange(4), groups):
        for f in range(frames):
            terms += info_nce64(unit64(x[rows, f].reshape(-1, 8)), unit64(y[rows, f].reshape(-1, 8)), TEMPERATURE)
    np.testing.assert_allclose(loss.mean(), np.mean(terms), rtol=RTOL)


def contrastive(x, y, weight):
    return contrastive_loss(x[:, 0, 0], y[:, 0, 0], jnp.asarray(0.07), weight)


def global_text(x, y, weight):
    return global_text_loss(x[:, 0, 0], y[:, 0, 0], TEMPERATURE, weight)


def global_vision(x, y, weight, norm_over_frames=False):
    return global_vision_loss(x[:, :, 0], y[:, :, 0], TEMPERATURE, weight, norm_over_frames)


def local_text(x, y, weight):
    return local_text_loss(x[:, 0], y[:, 0], jnp.ones(x[:, 0].shape[:2], bool), weight, TEMPERATURE, 1)


def local_vision(x, y, weight):
    return local_vision_loss(x, y, weight, TEMPERATURE, 1)


# losses of anchors and targets (B, F, T, D) and the weight of each sample
COMPARISONS = {
    "contrastive": contrastive,
    "global_text": global_text,
    "global_vision": global_vision,
    "global_vision, as the reference": partial(global_vision, norm_over_frames=True),
    "local_text": local_text,
    "local_vision": local_vision,
}
SHAPE = (3, 2, 4, 8)
compared = pytest.mark.parametrize("loss", COMPARISONS.values(), ids=COMPARISONS)


def means(loss, x, y, weight):
    """The mean and its gradients by anchors and targets."""
    return jax.jit(jax.value_and_grad(lambda x, y: loss(x, y, weight).mean(), argnums=(0, 1)))(f32(x), f32(y))


@compared
@pytest.mark.parametrize("garbage", [0.0, 1e4])
def test_padding_rows_change_no_mean_and_get_no_gradient(loss, garbage):
    x, y, tail = random(*SHAPE), random(*SHAPE, seed=1), garbage * random(2, *SHAPE[1:], seed=2)
    value, gradients = means(loss, x, y, ones(3))
    padded, padded_gradients = means(
        loss, np.concatenate([x, tail]), np.concatenate([y, tail]), jnp.asarray([1.0, 1, 1, 0, 0])
    )
    np.testing.assert_allclose(padded, value, rtol=1e-6)
    for gradient, padded_gradient in zip(gradients, padded_gradients, strict=True):
        np.testing.assert_allclose(padded_gradient[:3], gradient, atol=1e-5)
        np.testing.assert_array_equal(padded_gradient[3:], 0.0)


def test_padding_rows_change_no_mean_of_the_classifiers():
    logits, is_pair = random(5, 2), np.array([True, False, True, False, True])
    weight = jnp.asarray([1.0, 1, 1, 0, 0])
    for loss in (matching_loss, matching_correct):
        full = loss(f32(logits), jnp.asarray(is_pair), weight).mean()
        cut = loss(f32(logits[:3]), jnp.asarray(is_pair[:3]), ones(3)).mean()
        np.testing.assert_allclose(full, cut, rtol=1e-6)


@compared
def test_targets_of_completion_carry_no_gradient(loss):
    _, (by_anchors, by_targets) = means(loss, random(*SHAPE), random(*SHAPE, seed=1), ones(3))
    assert np.abs(by_anchors).max() > 1e-3
    if loss is contrastive:
        assert np.abs(by_targets).max() > 1e-3  # both encoders learn
    else:
        np.testing.assert_array_equal(by_targets, 0.0)


@compared
def test_gradients_are_finite_at_zero_vectors(loss):
    value, gradients = means(loss, np.zeros(SHAPE), np.zeros(SHAPE), ones(3))
    assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)
    x = random(*SHAPE)
    x[0] = 0
    value, gradients = means(loss, x, random(*SHAPE, seed=1), ones(3))
    assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("loss", [contrastive, global_text, global_vision], ids=lambda loss: loss.__name__)
def test_a_batch_of_one_has_nothing_to_be_told_from(loss):
    value, gradients = means(loss, random(1, 2, 4, 8), random(1, 2, 4, 8, seed=1), ones(1))
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_identical_captions_share_the_probability():
    """Two rows that cannot be told apart: each direction of the loss is log 2, the gradient finite."""
    x = np.broadcast_to(random(8), (2, 1, 1, 8))
    value, gradients = means(contrastive, x, x, ones(2))
    np.testing.assert_allclose(value, 2 * np.log(2), rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@compared
def test_a_batch_of_padding_alone_gives_zero(loss):
    value, gradients = means(loss, random(*SHAPE), random(*SHAPE, seed=1), jnp.zeros(3))
    assert float(value) == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def test_losses_of_bfloat16_outputs_are_computed_in_float32():
    logits = jnp.asarray(random(3, 4, 11), jnp.bfloat16)
    labels = jnp.zeros((3, 4), jnp.int32)
    assert masked_language_loss(logits, labels, ones(3, 4)).total.dtype == jnp.float32
    assert matching_loss(logits[:, 0, :2], labels[:, 0] > 0, ones(3)).total.dtype == jnp.float32
    assert contrastive_loss(logits[:, 0], logits[:, 1], jnp.asarray(0.07), ones(3)).total.dtype == jnp.float32
