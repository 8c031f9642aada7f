"""Visual entailment (SNLI-VE): does the image contradict the text, say nothing of it, or entail it?

METHOD section 7; the settings are METER's.

Axes: B batch.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float, Key

from scl_jax.models.scl import SCL
from scl_jax.objectives.classification import class_correct, class_loss
from scl_jax.tasks.task import ClassifierTask, needed
from scl_jax.tasks.vqa import joint_vector
from scl_jax.types import Batch, LossSum


@dataclasses.dataclass(frozen=True)
class Entailment(ClassifierTask):
    """joint vector → Linear(2D, 2D), LayerNorm, GELU, Linear(3); cross entropy."""

    loss = "entailment"

    def logits(self, model: SCL, batch: Batch, key: Key[Array, ""] | None = None) -> Float[Array, "B 3"]:
        """Logits of the three classes."""
        return model.entailment(joint_vector(model, batch, key))

    def judge(self, logits: Float[Array, "B 3"], batch: Batch) -> tuple[LossSum, LossSum]:
        """Loss, and how many are told right."""
        labels = needed(batch.label, "label")
        return class_loss(logits, labels, batch.weight), class_correct(logits, labels, batch.weight)
