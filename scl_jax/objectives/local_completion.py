"""Local semantic completion, MLTC: recover the features of masked tokens (GLSCL, arXiv 2306.07096; METHOD section 4).

Negatives are the masked tokens of the same group of samples, whatever the number of devices. On video (ours) every
frame is a set of its own: neighbouring frames show nearly the same patches and are no negatives.

Axes: B batch, F frames, R replaced patches, T masked text tokens, G groups, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scl_jax.models.heads import unit
from scl_jax.objectives.contrastive import info_nce
from scl_jax.partition import split_batch
from scl_jax.types import LossSum


def local_text_loss(
    anchors: Float[Array, "B T D"],
    targets: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    weight: Float[Array, " B"],
    temperature: float,
    groups: int,
) -> LossSum:
    """InfoNCE among the masked text tokens of each of `groups` groups of neighbouring samples."""

    def grouped(x):  # (B, T, …) → (G, B/G · T, …)
        return split_batch(x.reshape(groups, -1, *x.shape[2:]))

    token_weight = valid * weight[:, None]
    return info_nce(
        unit(grouped(anchors)), unit(jax.lax.stop_gradient(grouped(targets))), temperature, grouped(token_weight)
    )


def local_vision_loss(
    anchors: Float[Array, "B F R D"],
    targets: Float[Array, "B F R D"],
    weight: Float[Array, " B"],
    temperature: float,
    groups: int,
) -> LossSum:
    """InfoNCE among the replaced patches of one frame index of each group; every patch weighs the same."""
    b, f, r, d = anchors.shape

    def grouped(x):  # (B, F, R, D) → (G, F, B/G · R, D)
        x = x.reshape(groups, b // groups, f, r, d)
        return split_batch(jnp.swapaxes(x, 1, 2).reshape(groups, f, -1, d))

    token_weight = jnp.broadcast_to(weight.reshape(groups, 1, b // groups, 1), (groups, f, b // groups, r))
    return info_nce(
        unit(grouped(anchors)),
        unit(jax.lax.stop_gradient(grouped(targets))),
        temperature,
        token_weight.reshape(groups, f, -1),
    )
