"""The whole network: vision encoder, text encoder, fusion encoder and the heads of its task.

Axes: B batch, F frames, L text tokens, N visual tokens (F [CLS] first, then patches), D fusion width, E contrastive
width, S kept patches, P patches of a frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from scl_jax.models.fusion import IMAGE_TYPE, Fused, FusionConfig, FusionEncoder, Pairing, Wanted, global_tokens
from scl_jax.models.heads import Classifier, ContrastiveHead, MaskedLanguageHead, MatchingHead, scoring
from scl_jax.models.layers import Precision
from scl_jax.models.text import TextConfig, TextEncoder
from scl_jax.models.vision import (
    ImageViews,
    VisionConfig,
    VisionEncoder,
    class_tokens_first,
    side_by_side,
    take_apart,
)

PRETRAINING_HEADS = ("contrastive", "matching", "masked_language")


@dataclasses.dataclass(frozen=True)
class SCLConfig:
    """Sizes of the whole network; `heads` names those it has, `answers` counts the classes of the head `vqa`."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    fusion: FusionConfig = FusionConfig()
    projection_width: int = 512
    initial_temperature: float = 0.07
    precision: Precision = Precision()
    heads: tuple[str, ...] = PRETRAINING_HEADS
    answers: int = 3129


class SCL(nnx.Module):
    """Semantic Completion Learning (Ji et al., CVPR 2023) for images and videos."""

    contrastive: ContrastiveHead
    matching: MatchingHead
    masked_language: MaskedLanguageHead
    vqa: Classifier
    nlvr2: Classifier
    entailment: Classifier
    rank: nnx.Linear

    def __init__(self, config: SCLConfig, rngs: nnx.Rngs):
        c, precision = config, config.precision
        self.vision = VisionEncoder(c.vision, precision, rngs)
        self.text = TextEncoder(c.text, precision, rngs)
        self.fusion = FusionEncoder(c.fusion, c.text.width, c.vision.width, precision, rngs)
        for head in c.heads:  # in their order: it decides which random numbers they start from
            setattr(self, head, _make_head(head, c, rngs))

    def encode_image(
        self,
        pixels: UInt8[Array, "B F height width 3"] | Float[Array, "B F height width 3"],
        keep: Int[Array, "B S"] | None = None,
        replaced: Bool[Array, "B P"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Visual tokens in the fusion width; see `VisionEncoder.embed` for the two kinds of masking."""
        return self.encode_images([ImageViews(pixels, keep, replaced)])[0]

    @jax.named_scope("vision")
    def encode_images(self, views: Sequence[ImageViews]) -> list[Float[Array, "_ _ D"]]:
        """(B·V, N, D) of several views of the same samples; side by side through the encoder where that is faster."""
        if len(views) > 1 and not self.vision.joins_views:
            return [self.encode_images([view])[0] for view in views]
        embedded = [view.embed(self.vision) for view in views]
        shapes = [x.shape[1:4] for x in embedded]
        x = self.fusion.image_transform(self.vision.encode(side_by_side(embedded), shapes))
        return [class_tokens_first(view.reshape(-1, *view.shape[2:])) for view in take_apart(x, shapes)]

    @jax.named_scope("text")
    def encode_text(
        self, token_ids: Int[Array, "B L"], token_mask: Bool[Array, "B L"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "B L D"]:
        """Text tokens in the fusion width."""
        return self.fusion.text_transform(self.text(token_ids, token_mask, key))

    @jax.named_scope("fusion")
    def fuse(
        self,
        text: Float[Array, "B L D"],
        text_mask: Bool[Array, "B L"],
        image: Float[Array, "B N D"],
        frames: int,
        key: Key[Array, ""] | None = None,
        image_type: int = IMAGE_TYPE,
        wanted: Wanted | None = None,
    ) -> Fused:
        """Fuses encoded texts with encoded images or clips of `frames` frames, row by row.

        `wanted` says which tokens are read.
        """
        return self.fusion(text, text_mask, image, frames, key, image_type, wanted)

    @jax.named_scope("fusion")
    def fuse_pairs(
        self,
        text: Float[Array, "B T D"],
        text_mask: Bool[Array, "B T"],
        image: Float[Array, "B I D"],
        frames: int,
        pairing: Pairing,
        wanted: Sequence[Wanted],
        key: Key[Array, ""] | None = None,
    ) -> list[Fused]:
        """Fuses the pairs of a `pairing` of encoded texts and images that lie side by side."""
        return self.fusion.fuse_pairs(text, text_mask, image, frames, pairing, wanted, key)

    def joint(
        self,
        text: Float[Array, "B L D"],
        text_mask: Bool[Array, "B L"],
        image: Float[Array, "B N D"],
        frames: int,
        key: Key[Array, ""] | None = None,
        image_type: int = IMAGE_TYPE,
    ) -> Float[Array, "B J"]:
        """The joint vectors of pairs; of the last fusion layer, only the tokens that are pooled are computed."""
        wanted = global_tokens(text.shape[0], frames)
        return self.fusion.joint(self.fuse(text, text_mask, image, frames, key, image_type, wanted))

    @jax.named_scope("contrastive_head")
    def project_image(self, image: Float[Array, "B N D"], frames: int) -> Float[Array, "B E"]:
        """Visual tokens → contrastive space, not normalised; the frames' [CLS] are averaged first."""
        return self.contrastive.image(image[:, :frames].mean(axis=1))

    @jax.named_scope("contrastive_head")
    def project_text(self, text: Float[Array, "B L D"]) -> Float[Array, "B E"]:
        """Text tokens → contrastive space, not normalised."""
        return self.contrastive.text(text[:, 0])


def _make_head(name: str, config: SCLConfig, rngs: nnx.Rngs) -> nnx.Module:
    """A head by its name; METHOD section 7 has those of the tasks."""
    c, precision, width = config, config.precision, config.fusion.width
    joint = 2 * width
    match name:
        case "contrastive":
            return ContrastiveHead(width, c.projection_width, c.initial_temperature, precision, rngs)
        case "matching":
            return MatchingHead(width, precision, rngs)
        case "masked_language":
            return MaskedLanguageHead(width, c.text.vocab_size, precision, rngs)
        case "vqa":
            return Classifier(joint, joint, c.answers, precision, rngs)
        case "nlvr2":  # the joint vectors of both images
            return Classifier(2 * joint, joint, 2, precision, rngs)
        case "entailment":
            return Classifier(joint, joint, 3, precision, rngs)
        case "rank":
            return scoring(joint, 1, precision, rngs)
    raise ValueError(f"unknown head {name!r}")
