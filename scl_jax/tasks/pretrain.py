"""Pre-training: which views, which losses, which accuracies (METHOD section 4).

`features` runs the network on one (micro-)batch and returns the losses that stay inside groups of samples, plus the
vectors that the whole batch is compared by; `whole_batch_losses` compares those. Keeping the two apart is what lets
gradient accumulation use the negatives of the whole batch (training/step.py).

Axes: B batch, F frames, L text tokens, D width, E contrastive width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from scl_jax.models.layers import split_key
from scl_jax.models.parameters import Params
from scl_jax.models.scl import SCL
from scl_jax.objectives.contrastive import contrastive_loss
from scl_jax.objectives.global_completion import global_text_loss, global_vision_loss
from scl_jax.objectives.local_completion import local_text_loss, local_vision_loss
from scl_jax.objectives.masked_language import masked_language_correct, masked_language_loss
from scl_jax.objectives.masks import Masks, MaskSpec, draw_masks, group_shape, harden_partners
from scl_jax.objectives.matching import matching_correct, matching_loss
from scl_jax.objectives.views import OBJECTIVES, encode_views, fuse_pairs, pairs_needed
from scl_jax.tasks.task import Outputs, WholeBatch, bounded_temperature
from scl_jax.types import Batch, LossSum


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The weight of an objective over training: 0 before `start`, linear over `ramp` steps, then constant."""

    weight: float
    start: int = 0
    ramp: int = 0

    def starts_by(self, step: int) -> bool:
        """Whether the objective takes part in step number `step` (from 0)."""
        return self.weight > 0 and step >= self.start

    def __call__(self, step) -> Float[Array, ""]:
        progress = (step - self.start + 1) / max(self.ramp, 1)
        return self.weight * jnp.clip(progress, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The seven objectives with their weights and settings."""

    ramps: Mapping[str, Ramp]
    masks: MaskSpec
    patch_size: int
    global_temperature: Mapping[str, float]  # of global_vision and global_text
    local_temperature: Mapping[str, float]  # of local_vision and local_text
    temperature_range: tuple[float, float] | None = (0.01, 1.0)  # of the contrastive one; None: not bounded
    norm_over_frames: bool = False

    @property
    def group_size(self) -> int:
        """Samples of a group: matching and local completion stay inside it."""
        return self.masks.group_size

    def active(self, step: int) -> tuple[str, ...]:
        """The objectives that take part in step number `step`; each set of them is compiled once."""
        return tuple(name for name in OBJECTIVES if name in self.ramps and self.ramps[name].starts_by(step))

    def weights(self, step) -> dict[str, Float[Array, ""]]:
        """The weight of every objective at `step` (traced)."""
        return {name: ramp(step) for name, ramp in self.ramps.items()}

    @jax.named_scope("masks")
    def draw_masks(self, batch: Batch, key: Key[Array, ""]) -> Masks:
        """The masks of a whole batch."""
        _, _, height, width, _ = batch.pixels.shape
        return draw_masks(batch, (height // self.patch_size) * (width // self.patch_size), key, self.masks)

    def constrain(self, params: Params) -> Params:
        """Parameters after an update, with the temperature back in its range."""
        return bounded_temperature(params, self.temperature_range)

    def features(
        self, model: SCL, batch: Batch, masks: Masks, active: Collection[str], key: Key[Array, ""] | None
    ) -> Outputs:
        """One pass of the network over a (micro-)batch; `key` switches dropout on."""
        views_key, pairs_key = split_key(key, 2)
        pairs = pairs_needed(active)
        views = encode_views(model, batch, masks, pairs, views_key)
        text = model.project_text(views.texts["full"])
        image = model.project_image(views.images["full"], views.frames)
        masks = harden_partners(masks, text, image, model.contrastive.temperature[...])
        fused = fuse_pairs(model, batch, views, masks, pairs, self.masks.group_size, pairs_key)
        losses, accuracies, vectors = {}, {}, {}
        if "contrastive" in active:
            vectors["contrastive_text"], vectors["contrastive_image"] = text, image
        if "matching" in active:
            logits = model.matching(model.fusion.joint(fused["matching"]))
            losses["matching"] = matching_loss(logits, masks.is_pair, batch.weight)
            accuracies["matching"] = matching_correct(logits, masks.is_pair, batch.weight)
        if "masked_language" in active:
            logits = model.masked_language(fused["language"].words)
            labels = jnp.take_along_axis(batch.token_ids, masks.language_slots, axis=1)
            weight = masks.language_valid * batch.weight[:, None]
            losses["masked_language"] = masked_language_loss(logits, labels, weight)
            accuracies["masked_language"] = masked_language_correct(logits, labels, weight)
        if "global_vision" in active:
            vectors["global_vision"] = fused["dropped"].frame_globals
            vectors["global_vision_target"] = fused["completion"].frame_globals
        if "global_text" in active:
            vectors["global_text"] = fused["completion"].text_global
            vectors["global_text_target"] = fused["dropped"].text_global
        losses |= self.local_completion(batch, masks, fused, active)
        whole_batch = WholeBatch(vectors, batch.weight, model.contrastive.temperature[...])
        return Outputs(losses, accuracies, whole_batch)

    @jax.named_scope("local_completion")
    def local_completion(self, batch: Batch, masks: Masks, fused, active: Collection[str]) -> dict[str, LossSum]:
        """Token-level completion inside groups of samples."""
        groups, _ = group_shape(batch.weight.shape[0], self.masks.group_size)
        losses = {}
        if "local_vision" in active:
            losses["local_vision"] = local_vision_loss(
                fused["replaced"].patches,
                fused["completion"].patches,
                batch.weight,
                self.local_temperature["local_vision"],
                groups,
            )
        if "local_text" in active:
            losses["local_text"] = local_text_loss(
                fused["completion"].words,
                fused["dropped"].words,
                masks.completion_valid,
                batch.weight,
                self.local_temperature["local_text"],
                groups,
            )
        return losses

    @jax.named_scope("whole_batch_losses")
    def whole_batch_losses(self, features: WholeBatch) -> dict[str, LossSum]:
        """The losses whose negatives are the whole batch."""
        vectors, weight = features.vectors, features.weight
        losses = {}
        if "contrastive_text" in vectors:
            losses["contrastive"] = contrastive_loss(
                vectors["contrastive_text"], vectors["contrastive_image"], features.temperature, weight
            )
        if "global_vision" in vectors:
            losses["global_vision"] = global_vision_loss(
                vectors["global_vision"],
                vectors["global_vision_target"],
                self.global_temperature["global_vision"],
                weight,
                self.norm_over_frames,
            )
        if "global_text" in vectors:
            losses["global_text"] = global_text_loss(
                vectors["global_text"],
                vectors["global_text_target"],
                self.global_temperature["global_text"],
                weight,
            )
        return losses
