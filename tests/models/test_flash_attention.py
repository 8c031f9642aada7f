"""The attention kernel, run as ordinary operations: the numbers, gradients and dropout masks of plain attention.

On a GPU the compiled kernel is compared in tests/test_gpu.py.
"""

import attention_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import run

from scl_jax.models.attention import attend, plain_attention
from scl_jax.models.flash_attention import flash_attention
from scl_jax.partition import on_mesh
from scl_jax.training.sharding import batch_sharding, make_mesh

HEADS, WIDTH = 2, 16
KEY = jax.random.key(7)


def inputs(queries: int, keys: int, batch: int = 3):
    return attention_case.inputs(queries, keys, HEADS, WIDTH, batch)


def flash(query, key, value, mask, rate):
    return flash_attention(query, key, value, mask, rate, KEY, interpret=True)


def plain(query, key, value, mask, rate):
    return plain_attention(rate, query, key, value, mask, KEY)


@pytest.mark.parametrize(
    ("queries", "keys", "lengths"),
    [(70, 70, None), (65, 130, (130, 64, 3)), (3, 64, (64, 63, 1)), (128, 5, (5, 1, 4))],
)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_output_and_gradients_are_those_of_plain_attention(queries, keys, lengths, rate):
    mask = None if lengths is None else jnp.arange(keys) < jnp.array(lengths)[:, None]
    arrays = inputs(queries, keys)
    results = [jax.jit(lambda *xs, f=f: run(f, xs, mask, rate))(*arrays) for f in (flash, plain)]
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_row_without_keys_is_finite_and_gives_nothing_to_other_rows():
    mask = jnp.arange(9) < jnp.array([9, 4, 0])[:, None]
    arrays = inputs(6, 9)
    for ours, expected in zip(run(flash, arrays, mask, 0.2), run(plain, arrays, mask, 0.2), strict=True):
        assert jnp.isfinite(ours).all()
        np.testing.assert_allclose(ours[:2], expected[:2], atol=2e-5)


def test_devices_compute_their_own_samples_with_the_same_masks():
    arrays = inputs(10, 12, batch=8)
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    split = jax.jit(on_mesh(mesh, lambda *xs: run(flash, xs, None, 0.3)), in_shardings=batch_sharding(mesh))
    for ours, alone in zip(split(*arrays), run(flash, arrays, None, 0.3), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-6)


def test_what_is_kept_for_the_backward_pass_has_no_axis_of_keys_beside_one_of_queries():
    arrays = inputs(40, 48)
    _, pull = jax.eval_shape(lambda *xs: jax.vjp(lambda *xs: flash(*xs, None, 0.1), *xs), *arrays[:3])
    assert not [x.shape for x in jax.tree.leaves(pull) if {40, 48} <= set(x.shape)]


def test_who_computes_attention(monkeypatch):
    seen = []
    monkeypatch.setattr("scl_jax.models.attention.flash_attention", lambda *xs: seen.append(xs[4]) or xs[0])
    query, key, value, _ = inputs(4, 4)
    attend(query, key, value, implementation="fused")
    attend(query, key, value, dropout_rate=0.1, dropout_key=KEY, implementation="fused")
    attend(query[..., :4], key[..., :4], value[..., :4], dropout_rate=0.1, dropout_key=KEY, implementation="fused")
    assert seen == [0.0, 0.1]  # heads of width 4 are too narrow: the plain way
