"""InfoNCE and the image-text contrastive objective (METHOD section 4).

Axes: G groups, B rows (samples, or tokens of a group), T texts of an image, E width of the compared vectors.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scl_jax.models.heads import unit
from scl_jax.types import LossSum


def info_nce(
    anchors: Float[Array, "*G B E"],
    targets: Float[Array, "*G B E"],
    temperature: float | Float[Array, ""],
    weight: Float[Array, "*G B"],
) -> LossSum:
    """InfoNCE of matched unit vectors, the *sum* of both directions; rows of weight 0 are neither anchor nor negative.

    Returns:
        Σ_i weight_i · (-log softmax_row(S/t)_ii - log softmax_column(S/t)_ii) and Σ_i weight_i, where S is
        anchors · targetsᵀ within each group.
    """
    similarity = jnp.einsum("...be,...ce->...bc", anchors, targets, precision=jax.lax.Precision.HIGHEST)
    logits = similarity / temperature
    real = weight > 0
    # not jnp.diagonal: that gathers, and where rows lie on many devices its indices travel
    diagonal = jnp.sum(jnp.where(jnp.eye(logits.shape[-1], dtype=bool), logits, 0.0), axis=-1)
    lowest = jnp.finfo(logits.dtype).min
    by_row = jax.nn.logsumexp(jnp.where(real[..., None, :], logits, lowest), axis=-1)
    by_column = jax.nn.logsumexp(jnp.where(real[..., :, None], logits, lowest), axis=-2)
    terms = by_row + by_column - 2 * diagonal
    return LossSum(jnp.sum(jnp.where(real, terms, 0.0) * weight), jnp.sum(weight))


def contrastive_loss(
    text: Float[Array, "B E"],
    image: Float[Array, "B E"],
    temperature: Float[Array, ""],
    weight: Float[Array, " B"],
) -> LossSum:
    """InfoNCE between projected texts and images over the whole batch; vectors need not be normalised."""
    return info_nce(unit(text), unit(image), temperature, weight)


def first_image_loss(text: Float[Array, "B T E"], image: Float[Array, "B E"], temperature: Float[Array, ""]) -> LossSum:
    """The first image against the texts of all images, its own being the first text: the reference's contrastive term
    of retrieval fine-tuning, which leaves the other images out (METHOD section 8, item 23)."""
    texts = unit(text).reshape(-1, text.shape[-1])
    logits = jnp.einsum("e,te->t", unit(image)[0], texts, precision=jax.lax.Precision.HIGHEST) / temperature
    return LossSum(jax.nn.logsumexp(logits) - logits[0], jnp.ones([], logits.dtype))
