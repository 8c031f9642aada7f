"""Attention of few queries to many tokens, without making keys and values.

The key of a token y is W_k·y + b_k. So a logit is q·k = (W_kᵀ·q)·y + q·b_k, whose last term is the same for all keys of
a query: softmax does not see it. And the weighted sum of values W_v·y + b_v is W_v times the weighted sum of y, plus
b_v times the sum of weights. For Q queries of K tokens that takes 2·Q·(D² + H·K·D) multiplications instead of
2·K·(D² + Q·D): the last fusion layer is read at the [CLS], or at masked slots, alone.

Axes: B batch, Q queries, K tokens that answer, H heads, d width of a head, D = H·d.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from scl_jax.models.attention import scaled
from scl_jax.models.dropout import dropout


def worthwhile(queries: int, tokens: int, heads: int, width: int) -> bool:
    """Whether that takes at most half of the multiplications; its products are smaller, and so slower ones."""
    return 2 * queries * (width + heads * tokens) <= tokens * (width + queries)


@jax.named_scope("attention")
def attention_of_few(
    query: Float[Array, "B Q H d"],
    tokens: Float[Array, "B K D"],
    key_kernel: Float[Array, "D H d"],
    value_kernel: Float[Array, "D H d"],
    value_bias: Float[Array, "H d"],
    token_mask: Bool[Array, "B K"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B Q H d"]:
    """What `models/attention.py:attend` gives for the keys and values of `tokens`.

    Softmax and sums in at least float32, products in the type of `tokens`.
    """
    dtype = tokens.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    asked = jnp.einsum("bqhd,Dhd->bqhD", scaled(query), key_kernel.astype(dtype))
    logits = jnp.einsum("bqhD,bkD->bhqk", asked, tokens, preferred_element_type=wide)
    if token_mask is not None:
        logits = jnp.where(token_mask[:, None, None, :], logits, jnp.finfo(wide).min)
    weights = dropout(jax.nn.softmax(logits, axis=-1), dropout_rate, dropout_key)
    read = jnp.einsum("bhqk,bkD->bqhD", weights.astype(dtype), tokens)
    total = weights.sum(axis=-1).swapaxes(1, 2)[..., None]  # (B, Q, H, 1); 1 without dropout
    y = jnp.einsum("bqhD,Dhd->bqhd", read, value_kernel.astype(dtype), preferred_element_type=wide)
    return (y + total * value_bias.astype(wide)).astype(dtype)
