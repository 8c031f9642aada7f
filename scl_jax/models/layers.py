"""Building blocks shared by the three encoders: types, norms, activations, feed-forward.

Axes: B batch, N tokens, S some of them, D width, M feed-forward width.
Weights and LayerNorms are float32 (or the given `param_dtype`), matrix products run in `dtype`, softmax in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
        return super().__call__(x).astype(self.out_dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) GELU of BERT and RoBERTa."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's `x · sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


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
