"""The layer of RoBERTa and of the fusion encoder: BERT's, with a second attention where it reads another stream.

Axes: B batch, N tokens, S some of them, Q queries, K keys, D width.
"""

from __future__ import annotations

import dataclasses

from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from scl_jax.models.attention import Projection, attend, merge_heads
from scl_jax.models.layers import FeedForward, Precision, Residual, gather_tokens, gelu, split_key


@dataclasses.dataclass(frozen=True)
class PostNormConfig:
    """Sizes of a BERT-style layer."""

    width: int
    heads: int
    mlp_width: int
    epsilon: float
    dropout: float
    attention_dropout: float
    attention: str = "xla"  # see `attend`


class PostNormAttention(nnx.Module):
    """Self- or cross-attention with its output projection, dropout, add & LayerNorm."""

    def __init__(self, config: PostNormConfig, cross: bool, precision: Precision, rngs: nnx.Rngs):
        c = config
        if cross:
            self.query = Projection(c.width, 1, c.heads, precision.bert_init, precision, rngs, c.attention)
            self.key_value = Projection(c.width, 2, c.heads, precision.bert_init, precision, rngs, c.attention)
        else:
            self.qkv = Projection(c.width, 3, c.heads, precision.bert_init, precision, rngs, c.attention)
        self.out = precision.linear(c.width, c.width, precision.bert_init, rngs)
        self.residual = Residual(c.width, c.epsilon, c.dropout, precision, rngs)
        self.cross = cross
        self.attention_dropout, self.implementation = c.attention_dropout, c.attention

    def project(self, x: Float[Array, "X Q D"], context: Float[Array, "C K D"] | None) -> tuple[Array, Array, Array]:
        """Queries of `x`, keys and values of `context` (of `x` itself without it).

        They have as many rows, X = C, unless it is decided later which of them meet.
        """
        if self.cross:
            (query,), (key, value) = self.query(x), self.key_value(x if context is None else context)
        elif context is None:
            query, key, value = self.qkv(x)
        else:  # some of the tokens ask, all of them answer
            (query,), (key, value) = self.qkv(x, last=1), self.qkv(context, first=1)
        return query, key, value

    def __call__(self, x, context, key_mask, key) -> Float[Array, "B Q D"]:
        return self.read(x, self.project(x, context), key_mask, key)

    def read(self, x, projected: tuple[Array, Array, Array], key_mask, key) -> Float[Array, "B Q D"]:
        """The same from what `project` gives."""
        attention_key, residual_key = split_key(key, 2)
        query, keys, values = projected
        update = attend(
            query,
            keys,
            values,
            key_mask,
            dropout_rate=self.attention_dropout,
            dropout_key=attention_key,
            implementation=self.implementation,
        )
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
        wanted: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """The layer's output at the tokens `wanted` (S of them), at all N without it."""
        self_key, *other_keys = split_key(key, 3)
        everything = None
        if wanted is not None:
            everything, x = x, gather_tokens(x, wanted)
        x = self.attention(x, everything, mask, self_key)
        projected = self.cross_attention.project(x, context) if self.cross else None
        return self.finish(x, projected, context_mask, other_keys)

    def finish(
        self,
        x: Float[Array, "B N D"],
        projected: tuple[Array, Array, Array] | None,
        context_mask: Bool[Array, "B K"] | None,
        keys: list,
    ) -> Float[Array, "B N D"]:
        """What follows self-attention; `projected` are queries of `x`, keys and values of the other stream, if any."""
        cross_key, mlp_key = keys
        if projected is not None:
            x = self.cross_attention.read(x, projected, context_mask, cross_key)
        return self.mlp_residual(x, self.mlp(x), mlp_key)
