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
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from scl_jax.models.dropout import dropout
from scl_jax.models.layer_norm_kernel import layer_norm_gradients


@dataclasses.dataclass(frozen=True)
class Precision:
    """Types of one model: `dtype` of activations, `param_dtype` of weights; `initializer_range` as in BERT."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    initializer_range: float = 0.02
    kernels: bool = False  # of our own, for GPUs: models/layer_norm_kernel.py
    units: str = ""  # of a CPU, that `product` suits: "amx" for bfloat16, "avx512" for float32, "" for all else

    @property
    def bert_init(self) -> Callable:
        """Initial weights of text, fusion and heads."""
        return nnx.initializers.normal(self.initializer_range)

    def linear(self, d_in: int, d_out: int, init: Callable, rngs: nnx.Rngs, use_bias: bool = True) -> Linear:
        return Linear(
            d_in,
            d_out,
            self.units,
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

    def __init__(self, d_in: int, d_out: int, units: str, **others: Any):
        super().__init__(d_in, d_out, **others)
        self.units = units

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... M"]:
        dtype: Any = self.dtype
        rows = x.reshape(-1, x.shape[-1]).astype(dtype)
        y: Any = product(rows, self.kernel[...].astype(dtype), self.units)
        if self.bias is not None:
            y = add_bias(y, self.bias[...])
        return y.reshape(*x.shape[:-1], self.out_features)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(rows: Float[Array, "R D"], kernel: Float[Array, "D M"], units: str = "") -> Float[Array, "R M"]:
    """`rows @ kernel`; on a CPU with a backward pass that its faster matrix products take. `units`: see `Precision`."""
    return contract(rows, kernel, 0, units == "amx")


def product_backward(units: str, kept, gradient):
    """Gradients of rows and kernel."""
    rows, kernel = kept
    amx = units == "amx"
    if units == "avx512":
        of_kernel = rows.T @ gradient
    else:
        on_cpu = partial(columns_first, amx=amx)
        of_kernel = jax.lax.platform_dependent(rows, gradient, cpu=on_cpu, default=lambda x, y: x.T @ y)
    return contract(gradient, kernel, 1, amx), of_kernel


product.defvjp(  # the product itself, not `product`: "dots" of `model.remat` keeps what it sees of products
    lambda rows, kernel, units: (contract(rows, kernel, 0, units == "amx"), (rows, kernel)), product_backward
)


def contract(x: Float[Array, "R K"], y: Float[Array, "_ _"], axis: int, amx: bool) -> Float[Array, "R _"]:
    """The product over the last axis of `x` and this one of `y`, in their type.

    With `amx` written so that XLA does not widen bfloat16 first: asked for float32, and nothing is transposed.
    """
    if not amx:
        return x @ (y.T if axis else y)
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32).astype(x.dtype)


def columns_first(x: Float[Array, "R D"], y: Float[Array, "R M"], amx: bool) -> Float[Array, "D M"]:
    """`x.T @ y`, the narrower one transposed before the product: XLA's own on a CPU does not read it by columns.

    With AVX-512, in float32, the one that does is as fast.
    """
    if x.shape[1] > y.shape[1]:
        return columns_first(y, x, amx).T
    columns = x.T.reshape(-1) if amx else x.T  # of a single axis: XLA does not see that it is transposed
    return contract(jnp.reshape(jax.lax.optimization_barrier(columns), x.shape[::-1]), y, 0, amx)


@jax.custom_vjp
def add_bias(x: Float[Array, "R *M"], bias: Float[Array, " *M"]) -> Float[Array, "R *M"]:
    """`x + bias` in the type of `x`; the bias' gradient is summed in that of the bias.

    Left to itself, XLA on a GPU sums tens of thousands of rows in bfloat16.
    """
    return x + bias.astype(x.dtype)


add_bias.defvjp(
    lambda x, bias: (add_bias(x, bias), bias),
    lambda bias, gradient: (gradient, gradient.sum(axis=0, dtype=bias.dtype)),
)


def spread(parameter: Float[Array, "..."], shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """`parameter` broadcast to `shape`, then cast: its gradient is summed in its own type, not that of activations."""
    return jnp.broadcast_to(parameter, shape).astype(dtype)


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
        self.out_dtype, self.kernels = precision.dtype, precision.kernels

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        both: Any = (self.scale, self.bias)  # there are both
        scale, bias = (jnp.asarray(p[...], self.dtype) for p in both)
        return layer_norm(x, scale, bias, self.epsilon, self.out_dtype, self.kernels)


# ---- functions that keep their input alone for the backward pass ----
#
# Left to itself, automatic differentiation keeps three or four more arrays of the same size for each of them.


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def layer_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    epsilon: float,
    dtype: Any = None,
    kernels: bool = False,
) -> Float[Array, "... D"]:
    """`(x - mean) / sqrt(variance + epsilon) · scale + bias`, computed in the type of `scale`, returned in `dtype`.

    `kernels`: with our own for the backward pass, on a GPU.
    """
    return layer_norm_forward(x, scale, bias, epsilon, dtype, kernels)[0]


def layer_norm_forward(x, scale, bias, epsilon: float, dtype: Any, kernels: bool):
    """The result, and what the backward pass needs: the input, and two numbers for each of its rows."""
    wide = x.astype(scale.dtype)
    mean = wide.mean(axis=-1, keepdims=True)
    centred = wide - mean
    inverse = jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return (centred * inverse * scale + bias).astype(dtype or scale.dtype), (x, mean, inverse, scale)


def layer_norm_backward(epsilon: float, dtype: Any, kernels: bool, kept, gradient):
    """Gradients of input, scale and bias."""
    x, mean, inverse, scale = kept
    if kernels and x.ndim > 1:
        return layer_norm_gradients(x, gradient, mean, inverse, scale)
    gradient = gradient.astype(scale.dtype)
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


def key_lengths(key: Float[Array, "B K *H"], key_mask: Bool[Array, "B K"] | None) -> Int[Array, " B"]:
    """How many keys of each sample count, for kernels: real keys come first, then padding.

    At least one, so that a row without any, which is padding of the batch, reads its first key and gives no NaN.
    """
    if key_mask is None:
        return jnp.full(key.shape[0], key.shape[1], jnp.int32)
    return jnp.maximum(key_mask.sum(axis=1, dtype=jnp.int32), 1)
