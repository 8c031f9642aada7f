"""Statements about two images (NLVR2): true or false? (METHOD section 7)

The statement is encoded once and fused with each image; the token type tells which image it is.

Axes: B batch, J = 2D joint width.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from scl_jax.models.fusion import IMAGE_TYPE, SECOND_IMAGE_TYPE
from scl_jax.models.layers import split_key
from scl_jax.models.scl import SCL
from scl_jax.objectives.classification import class_correct, class_loss
from scl_jax.objectives.views import interleave, separate
from scl_jax.tasks.task import ClassifierTask, needed
from scl_jax.types import Batch, LossSum


@dataclasses.dataclass(frozen=True)
class Statements(ClassifierTask):
    """Both joint vectors, 4D → Linear(4D, 2D), LayerNorm, GELU, Linear(2); cross entropy of (false, true)."""

    loss = "nlvr2"

    def logits(self, model: SCL, batch: Batch, key: Key[Array, ""] | None = None) -> Float[Array, "B 2"]:
        """Logits of (false, true)."""
        text_key, *fusion_keys = split_key(key, 3)
        text = model.encode_text(batch.token_ids, batch.token_mask, text_key)
        pixels = [batch.pixels, needed(batch.second_pixels, "second_pixels")]
        images = separate(model.encode_image(interleave(pixels)), 2)
        joints = [
            model.joint(text, batch.token_mask, image, batch.pixels.shape[1], fusion_key, image_type)
            for image, fusion_key, image_type in zip(images, fusion_keys, (IMAGE_TYPE, SECOND_IMAGE_TYPE), strict=True)
        ]
        return model.nlvr2(jnp.concatenate(joints, axis=-1))

    def judge(self, logits: Float[Array, "B 2"], batch: Batch) -> tuple[LossSum, LossSum]:
        """Loss, and how many are told right."""
        labels = needed(batch.label, "label")
        return class_loss(logits, labels, batch.weight), class_correct(logits, labels, batch.weight)
