"""Image-text (and video-text) matching: is this the text's image? (METHOD section 4)

Axes: B batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scl_jax.types import LossSum


def matching_loss(logits: Float[Array, "B 2"], is_pair: Bool[Array, " B"], weight: Float[Array, " B"]) -> LossSum:
    """Cross entropy of (other, pair)."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probability = jax.nn.log_softmax(logits)
    terms = -jnp.where(is_pair, log_probability[:, 1], log_probability[:, 0])
    return LossSum(jnp.sum(terms * weight), jnp.sum(weight))


def matching_correct(logits: Float[Array, "B 2"], is_pair: Bool[Array, " B"], weight: Float[Array, " B"]) -> LossSum:
    """How many are told right; the mean is the accuracy."""
    return LossSum(jnp.sum(((logits[:, 1] > logits[:, 0]) == is_pair) * weight), jnp.sum(weight))
