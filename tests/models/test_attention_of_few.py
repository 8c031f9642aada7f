"""Attention of few queries gives what attention with keys and values gives; segments are cut and joined again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.models.attention import attend
from scl_jax.models.attention_of_few import attention_of_few, worthwhile
from scl_jax.models.segments import Run, Segments, cut, join

B, Q, K, H, WIDTH = 3, 2, 11, 4, 8  # WIDTH of a head
D = H * WIDTH
SHAPES = ((B, Q, H, WIDTH), (B, K, D), (D, H, WIDTH), (D, H, WIDTH), (H, WIDTH), (H, WIDTH))
NAMES = ("query", "tokens", "key kernel", "value kernel", "key bias", "value bias")
MASK = np.arange(K) < np.array([K, 5, 1])[:, None]


def arrays() -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape)) for shape in SHAPES]


def few(mask, rate, key, query, tokens, key_kernel, value_kernel, key_bias, value_bias):
    del key_bias  # which softmax does not see
    return attention_of_few(query, tokens, key_kernel, value_kernel, value_bias, mask, rate, key)


def with_keys_and_values(mask, rate, key, query, tokens, key_kernel, value_kernel, key_bias, value_bias):
    keys = jnp.einsum("bkD,Dhd->bkhd", tokens, key_kernel) + key_bias
    values = jnp.einsum("bkD,Dhd->bkhd", tokens, value_kernel) + value_bias
    return attend(query, keys, values, mask, dropout_rate=rate, dropout_key=key)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_few_queries_read_what_keys_and_values_would_give_them(masked, rate):
    """Output and all gradients in float64; dropout takes the same weights."""
    with jax.enable_x64(True):
        mask, key = jnp.asarray(MASK) if masked else None, jax.random.key(3) if rate else None

        def run(way):
            output, pull = jax.vjp(lambda *xs: way(mask, rate, key, *xs), *arrays())
            return output, pull(jnp.asarray(np.random.default_rng(1).normal(size=output.shape)))

        (output, gradients), (expected, expected_gradients) = run(few), run(with_keys_and_values)
        np.testing.assert_allclose(output, expected, atol=1e-12)
        for name, gradient, other in zip(NAMES, gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(gradient, other, atol=1e-11, err_msg=name)


def test_in_bfloat16_sums_and_softmax_are_wide():
    narrow = [x.astype(jnp.bfloat16) for x in arrays()]
    output = few(None, 0.0, None, *narrow)
    assert output.dtype == jnp.bfloat16
    expected = few(None, 0.0, None, *(x.astype(jnp.float32) for x in narrow))
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.05 * float(jnp.abs(expected).max()))

    def loss(value_bias):  # a thousand ones, which bfloat16 would not count: it stops at 256
        query, tokens = jnp.zeros((1000, 1, H, WIDTH), jnp.bfloat16), jnp.zeros((1000, K, D), jnp.bfloat16)
        return few(None, 0.0, None, query, tokens, *narrow[2:5], value_bias).astype(jnp.float32).sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros((H, WIDTH))), 1000.0, rtol=1e-3)


def test_it_is_taken_where_it_spares_half_of_the_products():
    assert worthwhile(1, 325, 12, 768) and worthwhile(21, 325, 12, 768)  # [CLS], masked words; patches answer
    assert not worthwhile(98, 325, 12, 768)  # replaced patches
    assert not worthwhile(21, 50, 12, 768) and not worthwhile(325, 325, 12, 768) and not worthwhile(1, 1, 12, 768)


def test_segments_of_one_shape_are_one_run():
    segments = Segments((4, 4, 2, 1, 1), (6, 6, 6, 3, 3))
    assert segments.runs == [Run(2, 4, 6), Run(1, 2, 6), Run(2, 1, 3)]
    x = jnp.arange(2 * 12 * 5).reshape(2, 12, 5)
    parts = segments.of_queries(x)
    assert [part.shape for part in parts] == [(4, 4, 5), (2, 2, 5), (4, 1, 5)]
    np.testing.assert_array_equal(parts[0][1], x[0, 4:8])  # second segment of the first sample
    np.testing.assert_array_equal(parts[2][3], x[1, 11:12])
    np.testing.assert_array_equal(join(parts, 2), x)
    assert cut(jnp.zeros((2, 24)), [(3, 6), (2, 3)])[1].shape == (4, 3)
    with pytest.raises(ValueError, match="shorter"):
        Segments((4, 4), (6,)).runs  # noqa: B018


def test_a_segment_reads_its_own_answers_alone():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        segments = Segments((2, 2, 3), (4, 4, 1))
        query, keys, values = (jnp.asarray(rng.normal(size=(B, n, H, WIDTH))) for n in (7, 9, 9))
        mask = jnp.asarray(rng.random((B, 9)) < 0.7).at[:, jnp.array([0, 4, 8])].set(True)
        read = segments.read(lambda run, *arrays: attend(*arrays[:-1]), query, (keys, values, mask), [None, None])
        places = [(slice(0, 2), slice(0, 4)), (slice(2, 4), slice(4, 8)), (slice(4, 7), slice(8, 9))]
        expected = [attend(query[:, q], keys[:, k], values[:, k], mask[:, k]) for q, k in places]
        np.testing.assert_allclose(read, jnp.concatenate(expected, axis=1), atol=1e-12)
