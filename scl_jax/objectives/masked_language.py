"""Masked language modelling on the masked positions only (METHOD section 4).

Axes: B batch, M slots for masked tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scl_jax.types import LossSum


def masked_language_loss(
    logits: Float[Array, "B M V"], labels: Int[Array, "B M"], weight: Float[Array, "B M"]
) -> LossSum:
    """Cross entropy against the original tokens; slots of weight 0 do not count."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    terms = jax.nn.logsumexp(logits, axis=-1) - chosen
    return LossSum(jnp.sum(terms * weight), jnp.sum(weight))


def masked_language_correct(
    logits: Float[Array, "B M V"], labels: Int[Array, "B M"], weight: Float[Array, "B M"]
) -> LossSum:
    """How many masked tokens are named right; the mean is the accuracy."""
    return LossSum(jnp.sum((logits.argmax(axis=-1) == labels) * weight), jnp.sum(weight))
