"""What crosses rooms: the batch, the sum of a loss, and nothing else.

Axes: B batch, F frames (1 for an image), H W pixels, L text tokens, A answers, O other texts.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8


@flax.struct.dataclass
class Batch:
    """One batch of image-text or video-text pairs, of static shape.

    An image is a video of one frame. `pixels` are raw sRGB bytes; the step normalises them on the device.
    A row of weight 0 is padding: it takes part in no loss, no metric and no set of negatives.
    """

    pixels: UInt8[Array, "B F H W 3"] | Float[Array, "B F H W 3"]  # floats are taken as already normalised
    token_ids: Int[Array, "B L"]  # <s> … </s> <pad> …
    token_mask: Bool[Array, "B L"]  # True at every token that is not padding
    word_ids: Int[Array, "B L"]  # 0, 1, 2 … the word a token belongs to; -1 at <s>, </s> and padding
    weight: Float[Array, " B"]  # 1 a real example, 0 padding
    item_id: Int[Array, " B"]  # which image or clip of its data set: two rows of one item are no negatives in matching
    # the other images of matching, one a row, as the reference draws them; None: members of the same group
    false_pixels: UInt8[Array, "B F H W 3"] | Float[Array, "B F H W 3"] | None = None
    # what fine-tuning tasks read besides
    answer_scores: Float[Array, "B A"] | None = None  # visual questions: the soft score of every answer
    label: Int[Array, " B"] | None = None  # statements: 0 false, 1 true; entailment: its class
    second_pixels: UInt8[Array, "B F H W 3"] | Float[Array, "B F H W 3"] | None = None  # statements: the other image
    # retrieval: texts of other images, as the reference draws them; None: those of the same group
    other_ids: Int[Array, "B O L"] | None = None
    other_mask: Bool[Array, "B O L"] | None = None


FIELDS = tuple(field.name for field in dataclasses.fields(Batch))  # what data sets give besides stays on the host


@flax.struct.dataclass
class LossSum:
    """A loss as its sum and its weight, so that padding is free and the mean is exact under any partition.

    `total` is the sum over contributing terms, `weight` their number; the mean is `total / weight`.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def mean(self) -> Float[Array, ""]:
        """The weighted mean; 0 where nothing contributed."""
        return jnp.where(self.weight > 0, self.total / jnp.maximum(self.weight, 1.0), 0.0)

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.total + other.total, self.weight + other.weight)
