"""Visual question answering: one of the answers of a vocabulary, with soft scores (METHOD section 7).

Axes: B batch, A answers.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float, Key

from scl_jax.models.layers import split_key
from scl_jax.models.scl import SCL
from scl_jax.objectives.classification import answer_loss, answer_score
from scl_jax.tasks.task import ClassifierTask, needed
from scl_jax.types import Batch, LossSum


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(ClassifierTask):
    """joint vector → Linear(2D, 2D), LayerNorm, GELU, Linear(A); binary cross entropy."""

    loss = "vqa"

    def logits(self, model: SCL, batch: Batch, key: Key[Array, ""] | None = None) -> Float[Array, "B A"]:
        """A logit for every answer of the vocabulary."""
        return model.vqa(joint_vector(model, batch, key))

    def judge(self, logits: Float[Array, "B A"], batch: Batch) -> tuple[LossSum, LossSum]:
        """Loss, and the soft scores of the answers given."""
        scores = needed(batch.answer_scores, "answer_scores")
        return answer_loss(logits, scores, batch.weight), answer_score(logits, scores, batch.weight)


def joint_vector(model: SCL, batch: Batch, key: Key[Array, ""] | None = None) -> Float[Array, "B J"]:
    """The joint vector of every text with its image; `key` switches dropout on."""
    text_key, fusion_key = split_key(key, 2)
    text = model.encode_text(batch.token_ids, batch.token_mask, text_key)
    image = model.encode_image(batch.pixels)
    return model.joint(text, batch.token_mask, image, batch.pixels.shape[1], fusion_key)
