"""Global semantic completion, MGSC: recover the global feature of masked data from the other modality.

METHOD section 4; SCL, section 3.2 of arXiv 2211.13437. Targets carry no gradient.

Axes: B batch, F frames, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scl_jax.models.heads import unit
from scl_jax.objectives.contrastive import info_nce
from scl_jax.types import LossSum


def global_text_loss(
    anchors: Float[Array, "B D"], targets: Float[Array, "B D"], temperature: float, weight: Float[Array, " B"]
) -> LossSum:
    """InfoNCE over the whole batch between text globals of {full image, masked text} and {dropped image, full text}."""
    return info_nce(unit(anchors), unit(jax.lax.stop_gradient(targets)), temperature, weight)


def global_vision_loss(
    anchors: Float[Array, "B F D"],
    targets: Float[Array, "B F D"],
    temperature: float,
    weight: Float[Array, " B"],
    norm_over_frames: bool = False,
) -> LossSum:
    """InfoNCE over the batch between image globals of {dropped image, full text} and {full image, masked text}.

    Computed for each frame's [CLS] and averaged. `norm_over_frames` reproduces the reference, which divides clips by
    the norm over the frame axis, so that its similarities are no cosines (METHOD section 8, item 3).
    """
    axis = 1 if norm_over_frames and anchors.shape[1] > 1 else -1  # an image is normalised properly there too
    x = jnp.swapaxes(unit(anchors, axis), 0, 1)  # (F, B, D)
    y = jnp.swapaxes(unit(jax.lax.stop_gradient(targets), axis), 0, 1)
    frames = x.shape[0]
    loss = info_nce(x, y, temperature, jnp.broadcast_to(weight, (frames, *weight.shape)))
    return LossSum(loss.total / frames, loss.weight / frames)
