"""The layer of RoBERTa and of the fusion encoder: BERT's, with a second attention where it reads another stream.

Tokens of a sample may be those of several segments side by side (models/segments.py).

Axes: B batch, N tokens, S some of them, Q queries, K keys, X or C tokens of either kind, H heads, d width of a head, D
width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from scl_jax.models.attention import Projection, attend, merge_heads
from scl_jax.models.attention_of_few import attention_of_few, worthwhile
from scl_jax.models.layers import FeedForward, Precision, Residual, gather_tokens, gelu, split_key
from scl_jax.models.segments import Lengths, Run, Segments, Slots


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
        self.cross, self.heads, self.width = cross, c.heads, c.width
        self.attention_dropout, self.implementation = c.attention_dropout, c.attention

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        context: Float[Array, "B K D"] | None,
        key_mask: Bool[Array, "B K"] | None,
        key: Key[Array, ""] | None,
        segments: Segments | None = None,
    ) -> Float[Array, "B Q D"]:
        """`x` asks, `context` answers (`x` itself without it); without `segments` each is one."""
        tokens = x if context is None else context
        segments = segments or Segments(x.shape[1:2], tokens.shape[1:2])
        if not any(map(self.of_few, segments.runs)):
            return self.read(x, self.project(x, context), key_mask, key, segments)

        def attention(run: Run, query, tokens, key_mask, key):
            if self.of_few(run):
                return attention_of_few(query, tokens, *self.weights(), key_mask, self.attention_dropout, key)
            keys, values = self.answer(tokens)
            return self.attend(query, keys, values, key_mask, key)

        return self.update(x, attention, self.ask(x), (tokens, key_mask), key, segments)

    def project(self, x: Float[Array, "B X D"], context: Float[Array, "B C D"] | None) -> tuple[Array, Array, Array]:
        """Queries of `x`, keys and values of `context` (of `x` itself without it).

        It may be decided later which of them meet.
        """
        if context is None and not self.cross:
            query, key, value = self.qkv(x)
        else:
            query, (key, value) = self.ask(x), self.answer(x if context is None else context)
        return query, key, value

    def ask(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q H d"]:
        """Queries."""
        (query,) = self.query(x) if self.cross else self.qkv(x, last=1)
        return query

    def answer(self, context: Float[Array, "B K D"]) -> tuple[Float[Array, "B K H d"], Float[Array, "B K H d"]]:
        """Keys and values."""
        key, value = self.key_value(context) if self.cross else self.qkv(context, first=1)
        return key, value

    def weights(self) -> tuple[Array, Array, Array]:
        """Kernels (D, H, d) of keys and of values, and the bias of values."""
        kernel, bias = (self.key_value if self.cross else self.qkv).weights()
        return kernel[:, -2], kernel[:, -1], bias[-1]

    def of_few(self, run: Run) -> bool:
        """Whether so few tokens ask that keys and values are not worth making."""
        return worthwhile(run.queries, run.keys, self.heads, self.width)

    def read(
        self, x, projected: tuple[Array, Array, Array], key_mask, key, segments: Segments
    ) -> Float[Array, "B Q D"]:
        """The same as a call, from what `project` gives."""
        query, *answers = projected
        return self.update(x, lambda run, *arrays: self.attend(*arrays), query, (*answers, key_mask), key, segments)

    def attend(self, query, keys, values, key_mask, key) -> Float[Array, "B Q H d"]:
        """Attention with this layer's dropout."""
        options = {"dropout_rate": self.attention_dropout, "implementation": self.implementation}
        return attend(query, keys, values, key_mask, dropout_key=key, **options)

    def update(self, x, attention: Callable, query, answers, key, segments: Segments) -> Float[Array, "B Q D"]:
        """What follows attention, which takes place run by run (`Segments.read`)."""
        attention_key, residual_key = split_key(key, 2)
        heads = segments.read(attention, query, answers, split_key(attention_key, len(segments.runs)))
        return self.residual(x, self.out(merge_heads(heads)), residual_key)


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
        lengths: tuple[Lengths, Lengths] | None = None,
        wanted: Slots | None = None,
    ) -> Float[Array, "B S D"]:
        """The layer's output at the tokens `wanted` (S of them), at all N without it.

        `lengths`: of the segments of `x` and of `context`, which are as many; one of either without it.
        """
        own, others = lengths or (x.shape[1:2], () if context is None else context.shape[1:2])
        self_key, cross_key, mlp_key = split_key(key, 3)
        everything, asking = None, own
        if wanted is not None:
            everything, asking, x = x, wanted.lengths, gather_tokens(x, wanted.places)
        x = self.attention(x, everything, mask, self_key, Segments(asking, own))
        if self.cross:
            x = self.cross_attention(x, context, context_mask, cross_key, Segments(asking, others))
        return self.feed_forward(x, mlp_key)

    def feed_forward(self, x: Float[Array, "B N D"], key: Key[Array, ""] | None) -> Float[Array, "B N D"]:
        """What follows attention."""
        return self.mlp_residual(x, self.mlp(x), key)
