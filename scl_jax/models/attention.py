"""Attention: projections to heads, the plain way that runs anywhere, and others for CPUs, GPUs and TPUs.

Axes: B batch, Q queries, K keys, H heads, d width of a head, D = H·d.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from scl_jax.models.attention_by_head import WORTHWHILE, attention_by_head
from scl_jax.models.dropout import dropout
from scl_jax.models.flash_attention import HEAD_WIDTHS, flash_attention
from scl_jax.models.layers import Precision, add_bias, key_lengths, product
from scl_jax.models.mosaic_attention import MOST_KEYS, mosaic_attention
from scl_jax.partition import tensor_parallel


def attention_logits(
    query: Float[Array, "B Q H d"], key: Float[Array, "B K H d"], key_mask: Bool[Array, "B K"] | None
) -> Float[Array, "B H Q K"]:
    """q·k / √d in at least float32; the lowest number at keys that `key_mask` does not admit."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", scaled(query), key, preferred_element_type=dtype)
    return logits if key_mask is None else jnp.where(key_mask[:, None, None, :], logits, jnp.finfo(dtype).min)


def attention_weights(
    query: Float[Array, "B Q H d"], key: Float[Array, "B K H d"], key_mask: Bool[Array, "B K"] | None
) -> Float[Array, "B H Q K"]:
    """softmax(q·k / √d) over the keys that `key_mask` admits, in at least float32."""
    return jax.nn.softmax(attention_logits(query, key, key_mask), axis=-1)


def scaled(query: Float[Array, "B Q H d"]) -> Float[Array, "B Q H d"]:
    """`query / √d`: exact where d is a power of four, as 64 is."""
    return query * query.shape[-1] ** -0.5


@jax.named_scope("attention")
def attend(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    key_mask: Bool[Array, "B K"] | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    implementation: str = "xla",
) -> Float[Array, "B Q H d"]:
    """Multi-head scaled dot-product attention.

    Args:
        key_mask: which keys count; real keys first, then padding (only the kernels rely on the order).
        implementation: "xla"; on a CPU "by_head" (models/attention_by_head.py); on a TPU in bfloat16 "mosaic" (our
            kernel, models/mosaic_attention.py); on a GPU in bfloat16 "fused" (our kernel, models/flash_attention.py) or
            "cudnn". By head go large arrays without `key_mask`, cuDNN's kernels draw dropout from a seed that is fixed
            at compilation, ours take heads that lie on one device, on GPUs of the widths `HEAD_WIDTHS`, on TPUs up to
            `MOST_KEYS` keys; for the rest the plain way is taken.
    """
    dropping = dropout_key is not None and dropout_rate > 0.0
    large = query.shape[1] * key.shape[1] >= WORTHWHILE
    if implementation == "by_head" and large and key_mask is None and not tensor_parallel():
        return attention_by_head(scaled(query), key, value, dropout_rate, dropout_key)
    if implementation == "fused" and query.shape[-1] in HEAD_WIDTHS and not tensor_parallel():
        return flash_attention(query, key, value, key_mask, dropout_rate if dropping else 0.0, dropout_key)
    if implementation == "mosaic" and key.shape[1] <= MOST_KEYS and not tensor_parallel():
        return mosaic_attention(query, key, value, key_mask, dropout_rate if dropping else 0.0, dropout_key)
    if implementation == "cudnn" and not dropping:
        return cudnn_attention(query, key, value, key_mask, "cudnn")
    return plain_attention(dropout_rate, query, key, value, key_mask, dropout_key)


def takes_parts(implementation: str) -> bool:
    """Whether `attend` reads parts of an array where they lie; kernels take whole arrays, cutting them out copies."""
    return implementation in ("xla", "by_head")


# ---- the plain way, which keeps one array of size Q · K for the backward pass; left to itself XLA keeps three ----
#
# With logits l = q·k / √d of a query and a key, w = exp(l - max l), z = Σ w over the keys, m the dropout mask over its
# probability, ∂o the gradient of the output:
#
#     o = Σ m·w·v / z        ∂v = Σ m·w·(∂o / z)        ∂l = w·(m·(∂o / z)·v - (∂o / z)·o)
#
# so that all divisions are of rows of d numbers, not of K.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def plain_attention(
    dropout_rate: float,
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    key_mask: Bool[Array, "B K"] | None,
    dropout_key: Key[Array, ""] | None,
) -> Float[Array, "B Q H d"]:
    """Softmax in at least float32, dropout on its weights, products in the type of the inputs."""
    return plain_attention_forward(dropout_rate, query, key, value, key_mask, dropout_key)[0]


def plain_attention_forward(dropout_rate, query, key, value, key_mask, dropout_key):
    """The output, and what the backward pass needs."""
    logits = attention_logits(query, key, key_mask)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    inverse = 1.0 / weights.sum(axis=-1).swapaxes(1, 2)[..., None]  # (B, Q, H, 1)
    dropped = dropout(weights, dropout_rate, dropout_key).astype(value.dtype)
    y = jnp.einsum("bhqk,bkhd->bhqd", dropped, value, preferred_element_type=weights.dtype).swapaxes(1, 2)
    y = (y * inverse).astype(value.dtype)
    return y, (query, key, value, dropout_key, weights, inverse, y)


def plain_attention_backward(dropout_rate, kept, gradient):
    """Gradients of query, key and value."""
    query, key, value, dropout_key, weights, inverse, y = kept
    gradient = gradient * inverse
    along = (gradient * y).sum(axis=-1).swapaxes(1, 2)[..., None]  # (B, H, Q, 1)
    gradient = gradient.astype(value.dtype)
    dropped = dropout(weights, dropout_rate, dropout_key).astype(value.dtype)
    value_gradient = jnp.einsum("bhqk,bqhd->bhdk", dropped, gradient).transpose(0, 3, 1, 2)
    of_weights = jnp.einsum("bqhd,bkhd->bhqk", gradient, value, preferred_element_type=weights.dtype)
    of_logits = weights * (dropout(of_weights, dropout_rate, dropout_key) - along)
    of_logits = of_logits.astype(query.dtype)
    query_gradient = scaled(jnp.einsum("bhqk,bkhd->bhqd", of_logits, key).swapaxes(1, 2))
    key_gradient = jnp.einsum("bhqk,bqhd->bhdk", of_logits, scaled(query)).transpose(0, 3, 1, 2)
    return query_gradient, key_gradient, value_gradient, None, None


plain_attention.defvjp(plain_attention_forward, plain_attention_backward)


def cudnn_attention(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    key_mask: Bool[Array, "B K"] | None,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B Q H d"]:
    """`jax.nn.dot_product_attention` on lengths padded to even numbers, which cuDNN's kernels ask for in training.

    Masks go as lengths, not as a bias of size Q · K. A row without any real key, which is padding of the batch, reads
    its first key instead of nothing, so that no NaN arises.
    """
    b, queries = query.shape[:2]
    lengths = key_lengths(key, key_mask)
    query, key, value = (even_length(x) for x in (query, key, value))
    y = jax.nn.dot_product_attention(  # pyright: ignore[reportCallIssue]  (its overloads lack the lengths)
        query,
        key,
        value,
        query_seq_lengths=jnp.full(b, queries, jnp.int32),
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return y[:, :queries]


def even_length(x: Float[Array, "B N H d"]) -> Float[Array, "B M H d"]:
    """`x` with a row of zeros behind it if N is odd."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


class Projection(nnx.LinearGeneral):
    """Linear maps from width D to `parts` × H heads × d, as one matrix product (fused q/k/v).

    For kernels, which take whole arrays, as one product a part: cutting the result, and joining the gradients, would
    copy both.
    """

    def __init__(
        self,
        width: int,
        parts: int,
        heads: int,
        init: Callable,
        precision: Precision,
        rngs: nnx.Rngs,
        implementation: str = "xla",
    ):
        super().__init__(
            width,
            (parts, heads, width // heads),
            kernel_init=init,
            dtype=precision.dtype,
            param_dtype=precision.param_dtype,
            rngs=rngs,
        )
        self.parts, self.heads = parts, heads
        self.width, self.units = width, precision.units
        self.apart = implementation in ("fused", "mosaic")

    def weights(self) -> tuple[Array, Array]:
        """Kernel and bias."""
        bias: Any = self.bias  # there is one
        return self.kernel[...], bias[...]

    @jax.named_scope("qkv")
    def __call__(
        self, x: Float[Array, "... D"], first: int = 0, last: int | None = None
    ) -> tuple[Float[Array, "... H d"], ...]:
        """The parts `first` to `last` (without it), all by default."""
        kernel, bias = (p[..., first:last, :, :] for p in self.weights())
        kernel = kernel.astype(self.dtype)
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)  # see `Linear`
        parts, *head = bias.shape
        if tensor_parallel():  # heads lie on different devices, so their axis stays
            y = add_bias(jnp.einsum("ri,iphd->rphd", rows, kernel), bias)
        elif self.apart:
            products = [product(rows, kernel[:, part].reshape(-1, self.width)) for part in range(parts)]
            results = [add_bias(y, bias[part].reshape(-1)) for part, y in enumerate(products)]
            return tuple(y.reshape(*x.shape[:-1], *head) for y in results)
        else:
            y = add_bias(product(rows, kernel.reshape(-1, parts * self.width), self.units), bias.reshape(-1))
        y = y.reshape(*x.shape[:-1], parts, *head)
        # not cut by indices: their gradients would be padded to the whole, and added
        return tuple(part.squeeze(-3) for part in jax.lax.split(y, [1] * parts, axis=y.ndim - 3))


def merge_heads(x: Float[Array, "... H d"]) -> Float[Array, "... D"]:
    """(…, H, d) → (…, H·d)."""
    return x.reshape(*x.shape[:-2], -1)
