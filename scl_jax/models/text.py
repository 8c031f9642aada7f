"""Text encoder: RoBERTa (METHOD section 2).

Axes: B batch, L text tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from scl_jax.models.dropout import dropout
from scl_jax.models.layers import Precision, split_key, spread
from scl_jax.models.post_norm import PostNormConfig, PostNormLayer
from scl_jax.models.stack import Stack
from scl_jax.partition import split_batch, whole

PAD_ID = 1  # RoBERTa's; padding takes position 1, the first token position 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder; `max_positions` counts rows of the position table (514 for 512 tokens)."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    vocab_size: int = 50265
    max_positions: int = 514
    dropout: float = 0.1
    attention_dropout: float = 0.1
    remat: str = "none"
    unroll: int = 1  # layers a turn of the loop over layers
    attention: str = "xla"  # see `attend`
    epsilon: float = 1e-5  # RoBERTa's


def look_up(table: nnx.Embed, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Rows `ids` of an embedding table, in the type of activations.

    Gradients of the same word are summed in at least float32: `<mask>` has thousands of them, which in bfloat16 would
    be lost for the most part, and on a GPU wait for each other far longer.
    """
    rows = whole(table.embedding[...].astype(table.dtype))
    wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return split_batch(jnp.take(wide, ids, axis=0)).astype(rows.dtype)  # an id past the end gives NaN, not another word


class TextEncoder(nnx.Module):
    """Token ids (B, L) → (B, L, D)."""

    def __init__(self, config: TextConfig, precision: Precision, rngs: nnx.Rngs):
        c = config

        def embedding(rows: int) -> nnx.Embed:
            return nnx.Embed(
                rows,
                c.width,
                dtype=precision.dtype,
                param_dtype=precision.param_dtype,
                embedding_init=precision.bert_init,
                rngs=rngs,
            )

        self.word_embedding = embedding(c.vocab_size)
        self.position_embedding = embedding(c.max_positions)
        self.segment_embedding = embedding(1)  # RoBERTa has one segment
        self.norm = precision.norm(c.width, c.epsilon, rngs)
        layer = PostNormConfig(c.width, c.heads, c.mlp_width, c.epsilon, c.dropout, c.attention_dropout, c.attention)

        def make(rngs: nnx.Rngs) -> PostNormLayer:
            return PostNormLayer(layer, False, precision, rngs)

        self.layers = Stack(make, c.layers, c.remat, rngs, c.unroll)
        self.dropout = c.dropout

    def embed(self, token_ids: Int[Array, "B L"], key: Key[Array, ""] | None = None) -> Float[Array, "B L D"]:
        """Word + position + segment embeddings, LayerNorm, dropout."""
        real = (token_ids != PAD_ID).astype(jnp.int32)
        positions = jnp.cumsum(real, axis=1) * real + PAD_ID
        words = look_up(self.word_embedding, token_ids)
        x = words + spread(self.segment_embedding.embedding[0], words.shape, words.dtype)  # there is one segment
        return dropout(self.norm(x + look_up(self.position_embedding, positions)), self.dropout, key)

    def __call__(
        self,
        token_ids: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B L D"]:
        """Encodes texts; `token_mask` is True at real tokens, `key` switches dropout on."""
        embed_key, layers_key = split_key(key, 2)
        x = self.embed(token_ids, embed_key)
        return self.layers(x, lambda layer, x, key: layer(x, token_mask, key=key), layers_key)
