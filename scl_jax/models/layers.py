"""Building blocks shared by the three encoders: attention, feed-forward, a scanned stack of layers.

Axes: B batch, Q queries, K keys, H heads, N tokens, D width, M feed-forward width.
Weights and LayerNorms are float32 (or the given `param_dtype`), matrix products run in `dtype`, softmax in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from scl_jax.partition import split_batch


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

    def linear(self, d_in: int, d_out: int, init: Callable, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
        return nnx.Linear(
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


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Inverted dropout; the identity without a key or at rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def split_key(key: Key[Array, ""] | None, count: int) -> list:
    """`count` independent keys, or `count` times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def attention_weights(
    query: Float[Array, "B Q H d"], key: Float[Array, "B K H d"], key_mask: Bool[Array, "B K"] | None
) -> Float[Array, "B H Q K"]:
    """softmax(q·k / √d) over the keys that `key_mask` admits, in at least float32."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=dtype) / query.shape[-1] ** 0.5
    if key_mask is not None:
        logits = jnp.where(key_mask[:, None, None, :], logits, jnp.finfo(dtype).min)
    return jax.nn.softmax(logits, axis=-1)


@jax.named_scope("attention")
def attend(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    key_mask: Bool[Array, "B K"] | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B Q H d"]:
    """Multi-head scaled dot-product attention."""
    weights = attention_weights(query, key, key_mask).astype(value.dtype)
    weights = dropout(weights, dropout_rate, dropout_key)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class Projection(nnx.LinearGeneral):
    """Linear maps from width D to `parts` × H heads × d, as one matrix product (fused q/k/v)."""

    def __init__(self, width: int, parts: int, heads: int, init: Callable, precision: Precision, rngs: nnx.Rngs):
        super().__init__(
            width,
            (parts, heads, width // heads),
            kernel_init=init,
            dtype=precision.dtype,
            param_dtype=precision.param_dtype,
            rngs=rngs,
        )
        self.parts, self.heads = parts, heads

    @jax.named_scope("qkv")
    def __call__(self, x: Float[Array, "... D"]) -> tuple[Float[Array, "... H d"], ...]:
        y = super().__call__(x)  # (..., parts, H, d)
        return tuple(y[..., part, :, :] for part in range(self.parts))


def merge_heads(x: Float[Array, "... H d"]) -> Float[Array, "... D"]:
    """(…, H, d) → (…, H·d)."""
    return x.reshape(*x.shape[:-2], -1)


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


@dataclasses.dataclass(frozen=True)
class PostNormConfig:
    """Sizes of a BERT-style layer."""

    width: int
    heads: int
    mlp_width: int
    epsilon: float
    dropout: float
    attention_dropout: float


class PostNormAttention(nnx.Module):
    """Self- or cross-attention with its output projection, dropout, add & LayerNorm."""

    def __init__(self, config: PostNormConfig, cross: bool, precision: Precision, rngs: nnx.Rngs):
        c = config
        if cross:
            self.query = Projection(c.width, 1, c.heads, precision.bert_init, precision, rngs)
            self.key_value = Projection(c.width, 2, c.heads, precision.bert_init, precision, rngs)
        else:
            self.qkv = Projection(c.width, 3, c.heads, precision.bert_init, precision, rngs)
        self.out = precision.linear(c.width, c.width, precision.bert_init, rngs)
        self.residual = Residual(c.width, c.epsilon, c.dropout, precision, rngs)
        self.cross = cross
        self.attention_dropout = c.attention_dropout

    def project(self, x: Float[Array, "B Q D"], context: Float[Array, "B K D"] | None) -> tuple[Array, Array, Array]:
        """Queries of `x`, keys and values of `context` (of `x` itself in self-attention)."""
        if not self.cross:
            query, key, value = self.qkv(x)
            return query, key, value
        (query,), (key, value) = self.query(x), self.key_value(x if context is None else context)
        return query, key, value

    def __call__(self, x, context, key_mask, key) -> Float[Array, "B Q D"]:
        attention_key, residual_key = split_key(key, 2)
        query, keys, values = self.project(x, context)
        update = attend(query, keys, values, key_mask, dropout_rate=self.attention_dropout, dropout_key=attention_key)
        return self.residual(x, self.out(merge_heads(update)), residual_key)


class PostNormLayer(nnx.Module):
    """A BERT layer: self-attention, then (if `cross`) attention to another stream, then feed-forward."""

    def __init__(self, config: PostNormConfig, cross: bool, precision: Precision, rngs: nnx.Rngs):
        self.attention = PostNormAttention(config, False, precision, rngs)
        if cross:
            self.cross_attention = PostNormAttention(config, True, precision, rngs)
        self.mlp = FeedForward(config.width, config.mlp_width, gelu, precision, rngs)
        self.mlp_residual = Residual(config.width, config.epsilon, config.dropout, precision, rngs)
        self.cross = cross

    def __call__(
        self,
        x: Float[Array, "B N D"],
        mask: Bool[Array, "B N"] | None,
        context: Float[Array, "B K D"] | None = None,
        context_mask: Bool[Array, "B K"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B N D"]:
        self_key, cross_key, mlp_key = split_key(key, 3)
        x = self.attention(x, None, mask, self_key)
        if self.cross:
            x = self.cross_attention(x, context, context_mask, cross_key)
        return self.mlp_residual(x, self.mlp(x), mlp_key)


REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nnx.Module):
    """`depth` layers of one kind: parameters carry a leading layer axis, the forward pass is one scan.

    `remat`: "none" keeps every activation for the backward pass, "dots" only the results of matrix products with
    weights, "full" only the input of each layer.
    """

    def __init__(self, make_layer: Callable[[nnx.Rngs], nnx.Module], depth: int, remat: str, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0, axis_size=depth)
        def make(rngs: nnx.Rngs):
            return make_layer(rngs)

        self.each: Any = make(rngs)
        self.depth = depth
        self.remat = remat

    def __call__(self, x: Any, apply: Callable, key: Key[Array, ""] | None = None, return_layers: bool = False) -> Any:
        """Runs `x = apply(layer, x, key)` for each layer; also returns every layer's output if asked to.

        Args:
            x: a pytree of arrays, the same structure before and after a layer.
            apply: called with the layer, the state and that layer's dropout key (None without `key`).
            return_layers: also give the outputs of all layers, stacked on a leading axis.
        """
        graph, parameters = nnx.split(self.each)

        def body(carry, xs):
            layer_parameters, layer_key = xs
            y = split_batch(apply(nnx.merge(graph, layer_parameters), carry, layer_key))
            return y, (y if return_layers else None)

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        keys = None if key is None else jax.random.split(key, self.depth)
        x, layers = jax.lax.scan(body, split_batch(x), (parameters, keys))
        return (x, layers) if return_layers else x


def gather_tokens(x: Shaped[Array, "... N D"], index: Int[Array, "... S"]) -> Shaped[Array, "... S D"]:
    """Rows `index` (..., S) of `x`, sample by sample."""
    return jnp.take_along_axis(x, index[..., None], axis=-2)
