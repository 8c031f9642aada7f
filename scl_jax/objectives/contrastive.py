"""InfoNCE and the image-text contrastive objective (METHOD section 4).

Axes: G groups, B rows (samples, or tokens of a group), C some of the rows, T texts of an image, E width of the
compared vectors.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scl_jax.models.heads import unit
from scl_jax.partition import batch_shards
from scl_jax.types import LossSum

AT_ONCE = 2**26  # similarities that a device holds at a time: 256 MB in float32


def info_nce(
    anchors: Float[Array, "*G B E"],
    targets: Float[Array, "*G B E"],
    temperature: float | Float[Array, ""],
    weight: Float[Array, "*G B"],
    at_once: int = AT_ONCE,
) -> LossSum:
    """InfoNCE of matched unit vectors, the *sum* of both directions; rows of weight 0 are neither anchor nor negative.

    More than `at_once` similarities a device are computed in parts, forward and backward, so that memory grows with B
    and not with B².

    Returns:
        Σ_i weight_i · (-log softmax_row(S/t)_ii - log softmax_column(S/t)_ii) and Σ_i weight_i, where S is
        anchors · targetsᵀ within each group.
    """
    real = weight > 0
    parts = number_of_parts(math.prod(weight.shape) * weight.shape[-1] // batch_shards(), weight.shape[-1], at_once)
    if parts == 1:
        logits = similarities(anchors, targets) / temperature
        # not jnp.diagonal: that gathers, and where rows lie on many devices its indices travel
        diagonal = jnp.sum(jnp.where(jnp.eye(logits.shape[-1], dtype=bool), logits, 0.0), axis=-1)
        lowest = jnp.finfo(logits.dtype).min
        by_row = jax.nn.logsumexp(jnp.where(real[..., None, :], logits, lowest), axis=-1)
        by_column = jax.nn.logsumexp(jnp.where(real[..., :, None], logits, lowest), axis=-2)
    else:
        diagonal = jnp.sum(anchors * targets, axis=-1) / temperature
        by_row, by_column = normalizers_in_parts(anchors, targets, temperature, real, parts)
    terms = by_row + by_column - 2 * diagonal
    return LossSum(jnp.sum(jnp.where(real, terms, 0.0) * weight), jnp.sum(weight))


def similarities(anchors: Float[Array, "*G C E"], targets: Float[Array, "*G B E"]) -> Float[Array, "*G C B"]:
    """Products of all pairs within each group, in full precision also where the device's default is less."""
    return jnp.einsum("...ce,...be->...cb", anchors, targets, precision=jax.lax.Precision.HIGHEST)


def number_of_parts(elements: int, rows: int, at_once: int) -> int:
    """The smallest divisor of `rows` that leaves at most `at_once` of `elements` to a part."""
    return next(
        parts for parts in range(1, rows + 1) if rows % parts == 0 and (elements <= at_once * parts or parts == rows)
    )


def normalizers_in_parts(
    anchors: Float[Array, "*G B E"],
    targets: Float[Array, "*G B E"],
    temperature: float | Float[Array, ""],
    real: Bool[Array, "*G B"],
    parts: int,
) -> tuple[Float[Array, "*G B"], Float[Array, "*G B"]]:
    """log Σ exp(S/t) over every row and every column; a part takes every `parts`-th row, so all devices share it."""

    def split(x: Array, axis: int) -> Array:  # (…, B, …) → (parts, …, B/parts, …)
        shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    axis = real.ndim - 1
    lowest = jnp.finfo(anchors.dtype).min

    @jax.checkpoint
    def add(columns, rows):
        highest, total = columns  # of the rows so far: the column's largest logit, and Σ exp(logit - highest)
        some_anchors, some_real = rows
        logits = similarities(some_anchors, targets) / temperature
        by_row = jax.nn.logsumexp(jnp.where(real[..., None, :], logits, lowest), axis=-1)
        logits = jnp.where(some_real[..., :, None], logits, lowest)
        new = jax.lax.stop_gradient(jnp.maximum(highest, logits.max(axis=-2)))
        total = total * jnp.exp(highest - new) + jnp.exp(logits - new[..., None, :]).sum(axis=-2)
        return (new, total), by_row

    start = (jnp.full(real.shape, lowest, anchors.dtype), jnp.zeros(real.shape, anchors.dtype))
    (highest, total), by_row = jax.lax.scan(add, start, (split(anchors, axis), split(real, axis)))
    by_row = jnp.moveaxis(by_row, 0, axis + 1).reshape(real.shape)
    return by_row, highest + jnp.log(total)


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
