"""Building blocks shared by the three encoders: types, norms, activations, feed-forward.

Axes: B batch, N tokens, S some of them, D width, M feed-forward width.
Weights and LayerNorms are float32 (or the given `param_dtype`), matrix products run in `dtype`, softmax in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from scl_jax.models.dropout import dropout


@dataclasses.dataclass(frozen=True)
class Precision:
    """Types of one model: `dtype` of activations, `param_dtype` of weights; `initializer_range` as in BERT."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    initializer_range: float = 0.02

    @property
    def bert_init(self) -> Callable:
        """Initial weights of text, fusion and heads."""
        return nnx.initializers.normal(self.initializer_range)

    def linear(self, d_in: int, d_out: int, init: Callable, rngs: nnx.Rngs, use_bias: bool = True) -> Linear:
        return Linear(
            d_in,
            d_out,
            use_bias=use_bias,
            kernel_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def norm(self, width: int, epsilon: float, rngs: nnx.Rngs) -> LayerNorm:
        return LayerNorm(width, epsilon, self, rngs)


class Linear(nnx.Linear):
    """A linear map of rows: leading axes are joined before the product.

    XLA on a CPU transposes whole activations for the gradient of a kernel where these have several axes.
    """

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... M"]:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.out_features)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm computed in at least float32, returned in the type of activations."""

    def __init__(self, width: int, epsilon: float, precision: Precision, rngs: nnx.Rngs):
        super().__init__(
            width,
            epsilon=epsilon,
            use_fast_variance=False,  # E[x²] - E[x]² loses digits that parity needs
            dtype=jnp.promote_types(precision.dtype, jnp.float32),
            param_dtype=precision.param_dtype,
            rngs=rngs,
        )
        self.out_dtype = precision.dtype

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        both: Any = (self.scale, self.bias)  # there are both
        scale, bias = (jnp.asarray(p[...], self.dtype) for p in both)
        y: Array = layer_norm(x, scale, bias, self.epsilon)
        return y.astype(self.out_dtype)


# ---- functions that keep their input alone for the backward pass ----
#
# Left to itself, automatic differentiation keeps three or four more arrays of the same size for each of them.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"], epsilon: float
) -> Float[Array, "... D"]:
    """`(x - mean) / sqrt(variance + epsilon) · scale + bias`, in the type of `scale`."""
    return layer_norm_forward(x, scale, bias, epsilon)[0]


def layer_norm_forward(x, scale, bias, epsilon: float):
    """The result, and what the backward pass needs: the input, and two numbers for each of its rows."""
    wide = x.astype(scale.dtype)
    mean = wide.mean(axis=-1, keepdims=True)
    centred = wide - mean
    inverse = jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return centred * inverse * scale + bias, (x, mean, inverse, scale)


def layer_norm_backward(epsilon: float, kept, gradient):
    """Gradients of input, scale and bias."""
    x, mean, inverse, scale = kept
    unit = (x.astype(scale.dtype) - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    scaled = gradient * scale
    along = unit * (scaled * unit).mean(axis=-1, keepdims=True)
    dx = inverse * (scaled - scaled.mean(axis=-1, keepdims=True) - along)
    return dx.astype(x.dtype), (gradient * unit).sum(axis=rows), gradient.sum(axis=rows)


layer_norm.defvjp(layer_norm_forward, layer_norm_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) GELU of BERT and RoBERTa."""
    return jax.nn.gelu(x, approximate=False)


def gelu_backward(x, gradient):
    """`d/dx x·Φ(x) = Φ(x) + x·φ(x)`, with Φ and φ the distribution and density of the standard normal."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    slope = 0.5 * (1.0 + jax.lax.erf(wide * 0.5**0.5)) + wide * jnp.exp(-0.5 * wide**2) * (0.5 / jnp.pi) ** 0.5
    return ((gradient * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), gelu_backward)


@jax.custom_vjp
def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's `x · sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


def quick_gelu_backward(x, gradient):
    """With σ = sigmoid(1.702 x): `σ + 1.702 x·σ·(1 - σ)`."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    gate = 0.5 + 0.5 * jnp.tanh(0.851 * wide)  # sigmoid; XLA would keep the forward pass's if it were written alike
    return ((gradient * gate * (1.0 + 1.702 * wide * (1.0 - gate))).astype(x.dtype),)


quick_gelu.defvjp(lambda x: (quick_gelu(x), x), quick_gelu_backward)


def split_key(key: Key[Array, ""] | None, count: int) -> list:
    """`count` independent keys, or `count` times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class FeedForward(nnx.Module):
    """`down(activation(up(x)))`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable,
        precision: Precision,
        rngs: nnx.Rngs,
        up_init: Callable | None = None,
        down_init: Callable | None = None,
    ):
        self.up = precision.linear(width, hidden, up_init or precision.bert_init, rngs)
        self.down = precision.linear(hidden, width, down_init or precision.bert_init, rngs)
        self.activation = activation

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down(self.activation(self.up(x)))


class Residual(nnx.Module):
    """What follows every sub-layer of a post-LN layer: dropout, add, LayerNorm."""

    def __init__(self, width: int, epsilon: float, rate: float, precision: Precision, rngs: nnx.Rngs):
        self.norm = precision.norm(width, epsilon, rngs)
        self.rate = rate

    def __call__(self, x, update, key) -> Float[Array, "... D"]:
        return self.norm(x + dropout(update, self.rate, key))


def gather_tokens(x: Shaped[Array, "... N D"], index: Int[Array, "... S"]) -> Shaped[Array, "... S D"]:
    """Rows `index` (..., S) of `x`, sample by sample."""
    return jnp.take_along_axis(x, index[..., None], axis=-2)
