"""The attention kernel for TPUs, run as ordinary operations: numbers, gradients and masks of plain attention.

The TPU compiler takes it in tests/test_compile_tpu.py; it was never run on a TPU.
"""

import attention_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import run

from scl_jax.models.attention import attend, plain_attention
from scl_jax.models.mosaic_attention import MOST_KEYS, block_lanes, block_rows, mosaic_attention
from scl_jax.partition import on_mesh
from scl_jax.training.sharding import batch_sharding, make_mesh

KEY = jax.random.key(7)


def inputs(queries: int, keys: int, heads: int = 4, width: int = 64, batch: int = 3):
    return attention_case.inputs(queries, keys, heads, width, batch)


def mosaic(query, key, value, mask, rate):
    return mosaic_attention(query, key, value, mask, rate, KEY, interpret=True)


def plain(query, key, value, mask, rate):
    return plain_attention(rate, query, key, value, mask, KEY)


@pytest.mark.parametrize(
    ("queries", "keys", "lengths", "heads", "width"),
    [
        (65, 70, None, 4, 64),  # two blocks of two heads
        (5, 9, (9, 4, 1), 4, 16),  # all heads in half a vector
        (9, 5, (5, 1, 4), 3, 64),  # an odd number of them: one block of a vector and a half
        (6, 8, None, 2, 128),  # a vector each
        (650, 12, (12, 3, 7), 2, 64),  # two blocks of queries, the last one not full
    ],
)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_output_and_gradients_are_those_of_plain_attention(queries, keys, lengths, heads, width, rate):
    mask = None if lengths is None else jnp.arange(keys) < jnp.array(lengths)[:, None]
    arrays = inputs(queries, keys, heads, width)
    results = jax.jit(lambda *xs: run(mosaic, xs, mask, rate))(*arrays)
    with jax.enable_x64(True):  # a gradient of zero is one, up to 1e-16
        wide = [x.astype(jnp.float64) for x in arrays]
        exact = jax.jit(lambda *xs: run(plain, xs, mask, rate))(*wide)
    for ours, expected in zip(results, exact, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-6 * max(1.0, float(np.abs(expected).max())))


def test_a_row_without_keys_is_finite_and_gives_nothing_to_other_rows():
    mask = jnp.arange(9) < jnp.array([9, 4, 0])[:, None]
    arrays = inputs(6, 9)
    for ours, expected in zip(run(mosaic, arrays, mask, 0.2), run(plain, arrays, mask, 0.2), strict=True):
        assert jnp.isfinite(ours).all()
        np.testing.assert_allclose(ours[:2], expected[:2], atol=2e-5)


def test_devices_compute_their_own_samples_with_the_same_masks():
    arrays = inputs(10, 12, batch=8)
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    split = jax.jit(on_mesh(mesh, lambda *xs: run(mosaic, xs, None, 0.3)), in_shardings=batch_sharding(mesh))
    for ours, alone in zip(split(*arrays), run(mosaic, arrays, None, 0.3), strict=True):
        np.testing.assert_allclose(ours, alone, atol=2e-5)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    arrays = inputs(40, 48)[:3]
    _, pull = jax.eval_shape(lambda *xs: jax.vjp(lambda *xs: mosaic(*xs, None, 0.1), *xs), *arrays)
    kept = sum(x.size for x in jax.tree.leaves(pull) if x.dtype == jnp.float32)
    assert kept == sum(x.size for x in arrays)


def test_in_bfloat16_it_is_as_near_to_float32_as_plain_attention_is():
    arrays = inputs(65, 70)
    exact = run(plain, arrays, None, 0.1)
    halves = [x.astype(jnp.bfloat16) for x in arrays]
    for ours, other, expected in zip(run(mosaic, halves, None, 0.1), run(plain, halves, None, 0.1), exact, strict=True):
        errors = [jnp.linalg.norm((x.astype(jnp.float32) - expected).ravel()) for x in (ours, other)]
        assert errors[0] < 1.2 * errors[1]


def test_blocks_are_whole_heads_and_equal_parts_of_the_queries():
    lanes = [block_lanes(768, 64), block_lanes(64, 16), block_lanes(192, 64), block_lanes(512, 256)]
    assert lanes == [128, 64, 192, 256]
    assert [block_rows(325, 325), block_rows(788, 788), block_rows(1, 1), block_rows(4616, 50)] == [325, 400, 1, 464]


def test_who_computes_attention(monkeypatch):
    seen = []
    monkeypatch.setattr("scl_jax.models.attention.mosaic_attention", lambda *xs: seen.append(xs[4]) or xs[0])
    query, key, value, _ = inputs(4, 4)
    attend(query, key, value, implementation="mosaic")
    attend(query, key, value, dropout_rate=0.1, dropout_key=KEY, implementation="mosaic")
    many = jnp.zeros((1, MOST_KEYS + 1, 1, 8))
    attend(many[:, :1], many, many, implementation="mosaic")
    assert seen == [0.0, 0.1]  # so many keys do not fit: the plain way
