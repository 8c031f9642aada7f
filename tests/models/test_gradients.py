"""Gradients that are written by hand are those of automatic differentiation, and keep no more than they say."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scl_jax import build
from scl_jax.models import attention, layers
from scl_jax.models.dropout import dropout
from scl_jax.models.text import look_up

WIDE = 1e-12  # relative, float64


def normal(*shape: int, dtype=jnp.float64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape) + shape[-1]).normal(size=shape), dtype)


def norm(x, scale, bias) -> jax.Array:
    return layers.layer_norm(x, scale, bias, 1e-5)


def same_gradients(ours, plain, arguments, rtol: float) -> None:
    """Values and gradients of both in a random direction."""
    y, pull = jax.vjp(ours, *arguments)
    expected, pull_plain = jax.vjp(plain, *arguments)
    direction = normal(*y.shape, dtype=y.dtype)
    pairs = [(y, expected), *zip(pull(direction), pull_plain(direction), strict=True)]
    for value, reference in pairs:
        assert value.dtype == reference.dtype and value.shape == reference.shape
        np.testing.assert_allclose(value, reference, rtol=rtol, atol=rtol * float(jnp.abs(reference).max()))


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (layers.gelu, lambda x: 0.5 * x * (1 + jax.lax.erf(x / 2**0.5))),
        (layers.quick_gelu, lambda x: x / (1 + jnp.exp(-1.702 * x))),
    ],
)
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", WIDE), ("float32", 1e-6)])
def test_activations(ours, plain, dtype, rtol):
    with jax.enable_x64(True):
        x = jnp.concatenate([4 * normal(300), jnp.array([0.0, -30.0, 30.0, -8.0, 8.0])]).astype(dtype)
        same_gradients(ours, plain, (x,), rtol)


def test_layer_norm():
    def plain(x, scale, bias):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * scale + bias

    with jax.enable_x64(True):
        same_gradients(norm, plain, (3 + normal(2, 5, 16), normal(16), normal(1, 16)[0]), WIDE)


@pytest.mark.parametrize("widths", [(6, 9), (9, 6), (6, 6)])
@pytest.mark.parametrize("units", ["", "avx512"])
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", WIDE), ("float32", 1e-6)])
def test_product(widths, units, dtype, rtol):
    with jax.enable_x64(True):
        rows, kernel = normal(7, widths[0]).astype(dtype), normal(*widths).astype(dtype)
        same_gradients(jax.jit(partial(layers.product, units=units)), jnp.matmul, (rows, kernel), rtol)


@pytest.mark.parametrize(
    ("features", "float32", "bfloat16"),
    [("avx2", "", ""), ("avx2 avx512f", "avx512", ""), ("avx2 avx512f amx_bf16", "avx512", "amx"), (None, "", "")],
)
def test_units_of_this_processor(tmp_path, features, float32, bfloat16):
    if features:
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {features}\n")
    found = [build.units(dtype, tmp_path / "cpuinfo") for dtype in ("float32", "bfloat16", "float64")]
    assert found == [float32, bfloat16, ""]


@pytest.mark.parametrize("widths", [(96, 128), (128, 96)])
def test_products_for_amx_are_of_bfloat16(widths):
    """Where XLA on a CPU would widen both factors, and multiply float32 several times as slowly."""

    def both(rows, kernel, gradient):
        result, backward = jax.vjp(lambda x, w: layers.product(x, w.astype(x.dtype), units="amx"), rows, kernel)
        return result, *backward(gradient)

    shapes = ((200, widths[0]), widths, (200, widths[1]))
    rows, kernel, gradient = (normal(*shape).astype(jnp.bfloat16) for shape in shapes)
    program = jax.jit(both).lower(rows, kernel.astype(jnp.float32), gradient).compile().as_text() or ""
    types = dict(re.findall(r"%?([\w.-]+) = (\w+)\[", program))
    factors = [name for pair in re.findall(r" dot\(%?([\w.-]+), %?([\w.-]+)\)", program) for name in pair]
    assert [types[name] for name in factors] == ["bf16"] * 6
    wide = both(*(x.astype(jnp.float32) for x in (rows, kernel, gradient)))
    for ours, expected in zip(jax.jit(both)(rows, kernel, gradient), wide, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention(masked, rate):
    mask = jnp.arange(5) < jnp.array([5, 3])[:, None] if masked else None
    key = jax.random.key(3)

    def plain(query, keys, value):
        weights = dropout(attention.attention_weights(query, keys, mask), rate, key)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    def ours(query, keys, value):
        return attention.attend(query, keys, value, mask, dropout_rate=rate, dropout_key=key)

    with jax.enable_x64(True):
        same_gradients(ours, plain, (normal(2, 7, 3, 8), normal(2, 5, 3, 8), 2 * normal(2, 5, 3, 8)), WIDE)


def test_attention_in_bfloat16_is_near_float32():
    inputs = [normal(2, n, 3, 16, dtype=jnp.float32) for n in (7, 5, 5)]
    half = [x.astype(jnp.bfloat16) for x in inputs]
    direction = normal(2, 7, 3, 16, dtype=jnp.float32)
    y, pull = jax.vjp(attention.attend, *half)
    expected, pull_wide = jax.vjp(attention.attend, *(x.astype(jnp.float32) for x in half))
    got = (y, *pull(direction.astype(jnp.bfloat16)))
    for value, reference in zip(got, (expected, *pull_wide(direction)), strict=True):
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(value.astype(jnp.float32), reference, atol=0.02 * float(jnp.abs(reference).max()))


def kept(function, *arguments) -> list[tuple[int, ...]]:
    """Shapes of what the backward pass keeps, the largest last."""
    _, pull = jax.vjp(function, *arguments)
    return sorted((x.shape for x in jax.tree.leaves(pull)), key=lambda shape: int(np.prod(shape)))


def test_what_is_kept():
    x, scale = normal(4, 6, 8, dtype=jnp.float32), normal(8, dtype=jnp.float32)
    assert kept(layers.gelu, x) == kept(layers.quick_gelu, x) == [x.shape]
    *small, largest = kept(norm, x, scale, scale)
    assert largest == x.shape and all(shape in ((8,), (4, 6, 1)) for shape in small)
    query = normal(2, 50, 3, 4, dtype=jnp.float32)
    shapes = kept(lambda *xs: attention.attend(*xs, dropout_rate=0.1, dropout_key=jax.random.key(0)), *[query] * 3)
    assert [s for s in shapes if np.prod(s) > query.size] == [(2, 3, 50, 50)]


ROWS = 3000  # ones, of which bfloat16 can add up 256


def test_gradients_of_parameters_are_not_summed_in_the_type_of_activations():
    x = jnp.zeros((ROWS, 4), jnp.bfloat16)
    summed = {
        "bias": jax.grad(lambda bias: layers.add_bias(x, bias).sum(dtype=jnp.float32)),
        "row added to all": jax.grad(lambda row: (x + layers.spread(row, x.shape, x.dtype)).sum(dtype=jnp.float32)),
    }
    for name, gradient in summed.items():
        np.testing.assert_array_equal(gradient(jnp.zeros(4)), np.full(4, ROWS), err_msg=name)


def test_the_gradient_of_a_word_is_not_summed_in_the_type_of_activations():
    table = nnx.Embed(3, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(table)
    ids = jnp.ones((ROWS, 1), jnp.int32)
    gradient = jax.grad(lambda p: look_up(nnx.merge(graph, p), ids).sum(dtype=jnp.float32))(parameters)
    # cast to bfloat16 once, as the table is for all devices, not at each addition
    np.testing.assert_allclose(gradient["embedding"][...], np.array([0, ROWS, 0])[:, None] * np.ones(4), rtol=2**-8)
