"""cuDNN's attention is plain attention: the same numbers and gradients, whatever the lengths and masks.

cuDNN itself runs in tests/test_gpu.py; here its place is taken by XLA behind the same call.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax import build
from scl_jax.config import default_config
from scl_jax.models import attention

B, HEADS, WIDTH = 3, 2, 8


def inputs(queries: int, keys: int):
    rng = np.random.default_rng(0)
    shapes = [(B, n, HEADS, WIDTH) for n in (queries, keys, keys)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def fused(query, key, value, mask):
    return attention.cudnn_attention(query, key, value, mask, "xla")


@pytest.mark.parametrize("lengths", [(7, 7), (7, 4), (4, 5), (1, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_attention_is_plain_attention(lengths, masked):
    keys = lengths[1]
    mask = jnp.arange(keys) < jnp.array([keys, keys - 2, 1])[:, None] if masked else None
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(B, lengths[0], HEADS, WIDTH)), jnp.float32)

    def run(attend):
        def loss(query, key, value):
            y = attend(query, key, value, mask)
            return jnp.sum(y * weight), y

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs(*lengths))

    (gradient, y), (expected_gradient, expected) = run(fused), run(attention.attend)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    for ours, plain in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_a_row_without_keys_is_finite_and_gives_nothing_to_other_rows():
    mask = jnp.arange(5) < jnp.array([5, 3, 0])[:, None]
    y = fused(*inputs(4, 5), mask)
    assert jnp.isfinite(y).all()
    np.testing.assert_allclose(y[:2], attention.attend(*inputs(4, 5), mask)[:2], atol=1e-6)


def test_kernels_get_even_lengths_and_dropout_goes_the_plain_way(monkeypatch):
    seen = []

    def kernel(query, key, value, **options):
        seen.append((query.shape[1], key.shape[1], options["implementation"]))
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    y = attention.attend(*inputs(5, 7), implementation="cudnn")
    assert y.shape[1] == 5 and seen == [(6, 8, "cudnn")]
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    attention.attend(*inputs(5, 7), implementation="cudnn", **options)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("backend", "dtype", "option", "expected"),
    [
        ("gpu", "bfloat16", "auto", "fused"),
        ("gpu", "float32", "auto", "xla"),
        ("gpu", "bfloat16", "xla", "xla"),
        ("cpu", "bfloat16", "auto", "by_head"),
        ("cpu", "float32", "xla", "xla"),
        ("tpu", "bfloat16", "auto", "mosaic"),
        ("tpu", "float32", "auto", "xla"),
    ],
)
def test_which_attention_a_platform_gets(monkeypatch, backend, dtype, option, expected):
    config = default_config()
    config.model.update(dtype=dtype, attention=option)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    sizes = build.model_config(config)
    assert {sizes.vision.attention, sizes.text.attention, sizes.fusion.attention} == {expected}
    assert attention.takes_parts(expected) == (expected in ("xla", "by_head"))
