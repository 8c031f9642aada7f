"""Retrieval fine-tuning on images and videos: the true text among others, and the contrastive objective (METHOD 7).

An image or clip is encoded once for all its texts, and a text once for all its images: the other texts of an image are
those of other samples of its group, drawn evenly or, some of them, by contrastive similarity. (The reference draws them
from the data set and encodes them for every image anew; `Batch.other_ids` holds such texts.)

Axes: B batch, O other texts of an image, T = 1 + O texts (the first one is true), L text tokens, N visual tokens,
D width, E contrastive width, size samples of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from scl_jax.models.heads import unit
from scl_jax.models.layers import split_key
from scl_jax.models.parameters import Params
from scl_jax.models.scl import SCL
from scl_jax.objectives.classification import class_correct, class_loss
from scl_jax.objectives.contrastive import contrastive_loss, first_image_loss
from scl_jax.objectives.masks import group_shape, named_key
from scl_jax.tasks.task import Outputs, WholeBatch, bounded_temperature, needed
from scl_jax.types import Batch, LossSum


@flax.struct.dataclass
class OtherTexts:
    """Gumbel noise (B, size) that chooses other texts in a group; -inf where a text cannot be another's."""

    even: Float[Array, "B size"]
    hard: Float[Array, "B size"]


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Cross entropy of the rank scores of an image's texts, plus `contrastive_weight` times the contrastive loss."""

    others: int = 15  # texts of other images that an image is compared with
    hard_negatives: int = 0  # how many of them are drawn by contrastive similarity
    contrastive_weight: float = 0.5
    group_size: int = 64
    temperature_range: tuple[float, float] | None = (0.01, 1.0)
    first_image_only: bool = False  # the reference's contrastive term

    def active(self, step: int) -> tuple[str, ...]:
        """Both losses, or the first alone where the other has no weight."""
        return ("rank", "contrastive") if self.contrastive_weight > 0 else ("rank",)

    def weights(self, step: Any) -> dict[str, Any]:
        """The weight of both losses."""
        return {"rank": 1.0, "contrastive": self.contrastive_weight}

    def draw_masks(self, batch: Batch, key: Key[Array, ""]) -> OtherTexts | None:
        """What chooses the other texts: never of the same image, never the same words, never padding."""
        if batch.other_ids is not None:
            return None
        groups, size = group_shape(batch.weight.shape[0], self.group_size)
        items, ids = batch.item_id.reshape(groups, size), batch.token_ids.reshape(groups, size, -1)
        same = (items[:, :, None] == items[:, None, :]) | (ids[:, :, None] == ids[:, None, :]).all(axis=-1)
        allowed = ~same & (batch.weight.reshape(groups, 1, size) > 0)

        def noise(name: str) -> Float[Array, "B size"]:
            drawn = jax.random.gumbel(named_key(key, name), allowed.shape)
            return jnp.where(allowed, drawn, -jnp.inf).reshape(-1, size)

        return OtherTexts(noise("other_texts"), noise("hard_texts"))

    def features(
        self, model: SCL, batch: Batch, masks: OtherTexts | None, active: Collection[str], key: Key[Array, ""] | None
    ) -> Outputs:
        """One pass of the network over a (micro-)batch; `key` switches dropout on."""
        text_key, fusion_key = split_key(key, 2)
        image = model.encode_image(batch.pixels)
        image_vectors = model.project_image(image, batch.pixels.shape[1])
        temperature = model.contrastive.temperature[...]
        if masks is None:
            text, mask = encode_given(model, batch, text_key)
            vectors = fold(model.project_text(flat(text)), mask)  # (B, T, E)
            valid = jnp.ones(mask.shape[:2], bool)
        else:
            own = model.encode_text(batch.token_ids, batch.token_mask, text_key)
            own_vectors = model.project_text(own)
            chosen, valid = self.choose(masks, own_vectors, image_vectors, temperature)
            text, mask, vectors = (self.of_group(x, chosen) for x in (own, batch.token_mask, own_vectors))
        scores = rank_scores(model, text, mask, image, batch.pixels.shape[1], fusion_key)
        scores = jnp.where(valid, scores, -jnp.inf)
        first = jnp.zeros(scores.shape[0], jnp.int32)
        compared = {}
        if "contrastive" in active:
            compared = {"text": vectors if self.first_image_only else vectors[:, 0], "image": image_vectors}
        return Outputs(
            {"rank": class_loss(scores, first, batch.weight)},
            {"rank": class_correct(scores, first, batch.weight)},
            WholeBatch(compared, batch.weight, temperature),
        )

    def choose(
        self,
        masks: OtherTexts,
        text: Float[Array, "B E"],
        image: Float[Array, "B E"],
        temperature: Float[Array, ""],
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """Places in the group of every image's texts, its own first, and which of them count.

        Hard texts are drawn without replacement in proportion to exp(cosine / temperature), the rest evenly.
        """
        size = masks.even.shape[1]
        hard = min(self.hard_negatives, self.others, size)
        images, texts = (unit(jax.lax.stop_gradient(x)).reshape(-1, size, x.shape[-1]) for x in (image, text))
        logits = jnp.einsum("gie,gte->git", images, texts) / jax.lax.stop_gradient(temperature)
        best, hardest = jax.lax.top_k(masks.hard + logits.reshape(-1, size), hard)
        rows = jnp.arange(size * images.shape[0])
        even = masks.even.at[rows[:, None], hardest].set(-jnp.inf)  # not a second time
        rest, evenly = jax.lax.top_k(even, min(self.others - hard, size))
        own = (rows % size)[:, None]
        valid = jnp.concatenate([jnp.ones_like(own, bool), best > -jnp.inf, rest > -jnp.inf], axis=1)
        return jnp.concatenate([own, hardest, evenly], axis=1), valid

    def of_group(self, x: Array, chosen: Int[Array, "B T"]) -> Array:
        """Rows (B, …) by their places in each group → (B, T, …); nothing crosses groups."""
        groups, size = group_shape(x.shape[0], self.group_size)
        pick = jax.vmap(lambda rows, places: rows[places])
        picked = pick(x.reshape(groups, size, *x.shape[1:]), chosen.reshape(groups, size, -1))
        return picked.reshape(*chosen.shape, *x.shape[1:])

    def whole_batch_losses(self, features: WholeBatch) -> dict[str, LossSum]:
        """The contrastive loss between the images and their true texts."""
        if not features.vectors:
            return {}
        text, image = features.vectors["text"], features.vectors["image"]
        if self.first_image_only:
            return {"contrastive": first_image_loss(text, image, features.temperature)}
        return {"contrastive": contrastive_loss(text, image, features.temperature, features.weight)}

    def constrain(self, params: Params) -> Params:
        """Parameters after an update, with the temperature back in its range."""
        return bounded_temperature(params, self.temperature_range)


def encode_given(
    model: SCL, batch: Batch, key: Key[Array, ""] | None
) -> tuple[Float[Array, "B T L D"], Bool[Array, "B T L"]]:
    """The true text and the other texts that came with the batch, encoded, and their masks."""
    ids = jnp.concatenate([batch.token_ids[:, None], needed(batch.other_ids, "other_ids")], axis=1)
    mask = jnp.concatenate([batch.token_mask[:, None], needed(batch.other_mask, "other_mask")], axis=1)
    return fold(model.encode_text(flat(ids), flat(mask), key), ids), mask


def rank_scores(
    model: SCL,
    text: Float[Array, "B T L D"],
    mask: Bool[Array, "B T L"],
    image: Float[Array, "B N D"],
    frames: int,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B T"]:
    """The rank head's score of every image with each of its encoded texts."""
    images = jnp.repeat(image, text.shape[1], axis=0)  # (B·T, N, D)
    joint = model.joint(flat(text), flat(mask), images, frames, key)
    return fold(model.rank(joint)[:, 0], mask)


def flat(x: Array) -> Array:
    """(B, T, …) → (B·T, …), the texts of an image next to each other."""
    return x.reshape(-1, *x.shape[2:])


def fold(x: Array, like: Array) -> Array:
    """(B·T, …) → (B, T, …), with the B and T of `like`."""
    return x.reshape(*like.shape[:2], *x.shape[1:])
