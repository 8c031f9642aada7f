"""Attention by blocks of heads gives the numbers, gradients and dropout masks of plain attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.models import attention_by_head
from scl_jax.models.attention import attend
from scl_jax.partition import on_mesh
from scl_jax.training.sharding import batch_sharding, make_mesh

HEADS, WIDTH = 6, 8
KEY = jax.random.key(7)


def inputs(queries: int, keys: int, batch: int = 3, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, n, HEADS, WIDTH) for n in (queries, keys, keys, queries)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def run(implementation: str, arrays, rate: float):
    """Output and gradients."""
    *qkv, weight = arrays

    def loss(query, key, value):
        y = attend(query, key, value, dropout_rate=rate, dropout_key=KEY, implementation=implementation)
        return jnp.sum(y.astype(weight.dtype) * weight), y

    gradient, y = jax.grad(loss, (0, 1, 2), has_aux=True)(*qkv)
    return y, *gradient


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch):
    """Arrays of these tests count as large; of 9 queries and 11 keys a block holds two heads."""
    monkeypatch.setattr("scl_jax.models.attention.WORTHWHILE", 1)
    monkeypatch.setattr(attention_by_head, "BLOCK", 2 * 9 * 11)


@pytest.mark.parametrize(("queries", "keys", "heads"), [(9, 11, 2), (40, 50, 1), (1, 7, 6)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_output_and_gradients_are_those_of_plain_attention(queries, keys, heads, rate):
    with jax.enable_x64(True):
        arrays = inputs(queries, keys, dtype=jnp.float64)
        assert attention_by_head.heads_of_block(*arrays[:2]) == heads
        results = [jax.jit(lambda *xs, way=way: run(way, xs, rate))(*arrays) for way in ("by_head", "xla")]
        for ours, expected in zip(*results, strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, expected, atol=1e-13)


def test_types_are_those_of_plain_attention():
    """bfloat16 goes in and comes out; softmax is computed in float32."""
    arrays = [x.astype(jnp.bfloat16) for x in inputs(9, 11)]
    for ours, expected in zip(run("by_head", arrays, 0.3), run("xla", arrays, 0.3), strict=True):
        assert ours.dtype == expected.dtype == jnp.bfloat16
        wide, error = expected.astype(jnp.float32), (ours - expected).astype(jnp.float32)
        assert jnp.linalg.norm(error) < 2e-3 * jnp.linalg.norm(wide)  # a bit of the last place here and there


def test_devices_compute_their_own_samples_with_the_same_masks():
    arrays = inputs(9, 11, batch=8)
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    split = jax.jit(on_mesh(mesh, lambda *xs: run("by_head", xs, 0.3)), in_shardings=batch_sharding(mesh))
    text = split.lower(*arrays).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text
    for ours, alone in zip(split(*arrays), run("by_head", arrays, 0.3), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-6)


def test_what_is_kept_for_the_backward_pass_has_no_axis_of_keys_beside_one_of_queries():
    arrays = inputs(40, 48)[:3]
    dropping = {"dropout_rate": 0.1, "dropout_key": KEY, "implementation": "by_head"}
    _, pull = jax.eval_shape(lambda *xs: jax.vjp(lambda *xs: attend(*xs, **dropping), *xs), *arrays)
    assert not [x.shape for x in jax.tree.leaves(pull) if {40, 48} <= set(x.shape)]


def test_small_arrays_and_masked_keys_go_the_plain_way(monkeypatch):
    seen = []
    monkeypatch.setattr("scl_jax.models.attention.attention_by_head", lambda *xs: seen.append(xs[0].shape) or xs[0])
    monkeypatch.setattr("scl_jax.models.attention.WORTHWHILE", 9 * 11)
    for queries, keys, masked in ((9, 11, False), (9, 10, False), (9, 11, True), (1, 99, False)):
        query, key, value, _ = inputs(queries, keys)
        mask = jnp.ones((3, keys), bool) if masked else None
        attend(query, key, value, mask, implementation="by_head")
        attend(query, key, value, mask)
    assert seen == [(3, 9, HEADS, WIDTH), (3, 1, HEADS, WIDTH)]
