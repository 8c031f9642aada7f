"""Fusion encoder: two streams with co-attention (METHOD section 3).

Pairs that are made of the same samples go through it side by side (models/segments.py), also where their images have
different numbers of tokens.

Axes: B batch, F frames, L text tokens, N visual tokens (F [CLS] first, then patches), S and R some of them, T and I
tokens of all texts and images of a sample, D width, J = 2D joint width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from scl_jax.models.attention import attention_weights, takes_parts
from scl_jax.models.layers import Precision, split_key, spread
from scl_jax.models.post_norm import PostNormConfig, PostNormLayer
from scl_jax.models.segments import Lengths, Segments, Slots
from scl_jax.models.stack import Stack

TEXT_TYPE, IMAGE_TYPE, SECOND_IMAGE_TYPE = 0, 1, 2  # rows of the token-type table


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Sizes of the fusion encoder; `token_types` is 2, or 3 for tasks over two images."""

    width: int = 768
    layers: int = 6
    heads: int = 12
    mlp_width: int = 3072
    token_types: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.1
    remat: str = "none"
    unroll: int = 1  # layers a turn of the loop over layers
    attention: str = "xla"  # see `attend`
    epsilon: float = 1e-12  # BERT's


@flax.struct.dataclass
class Wanted:
    """Positions of the tokens that are read of the last layer, which is computed there only.

    The first of `text` is [CLS], the first of `image` are the [CLS] of the frames; patches come frame by frame.
    """

    text: Int[Array, "B S"]
    image: Int[Array, "B R"]


def global_tokens(batch: int, frames: int) -> Wanted:
    """The [CLS] of the text and of every frame: what pooling reads."""
    return Wanted(jnp.zeros((batch, 1), jnp.int32), jnp.broadcast_to(jnp.arange(frames), (batch, frames)))


@flax.struct.dataclass
class Fused:
    """Output of the last fusion layer for a batch of pairs: of all tokens, or of those that were wanted."""

    text: Float[Array, "B L D"]
    image: Float[Array, "B N D"]
    frames: int = flax.struct.field(pytree_node=False)

    @property
    def text_global(self) -> Float[Array, "B D"]:
        """The text's [CLS] (`<s>`)."""
        return self.text[:, 0]

    @property
    def frame_globals(self) -> Float[Array, "B F D"]:
        """The [CLS] of every frame."""
        return self.image[:, : self.frames]

    @property
    def words(self) -> Float[Array, "B T D"]:
        """The text without its [CLS]; where tokens were wanted, those behind it."""
        return self.text[:, 1:]

    @property
    def patches(self) -> Float[Array, "B F P D"]:
        """Patch tokens by frame."""
        b, n, d = self.image.shape
        return self.image[:, self.frames :].reshape(b, self.frames, (n - self.frames) // self.frames, d)


class Sizes(NamedTuple):
    """Tokens of the segments of both streams."""

    text: Lengths
    image: Lengths


class WantedSlots(NamedTuple):
    """What is `Wanted` of each of several pairs, as places among the tokens of all."""

    text: Slots
    image: Slots


def wanted_side_by_side(wanted: Sequence[Wanted], sizes: Sizes) -> WantedSlots:
    """Of pairs with these sizes."""

    def slots(places: Sequence[Int[Array, "B _"]], lengths: Lengths) -> Slots:
        starts = accumulate(lengths[:-1], initial=0)
        moved = [x + start for x, start in zip(places, starts, strict=True)]
        return Slots(jnp.concatenate(moved, axis=1), tuple(x.shape[1] for x in places))

    return WantedSlots(slots([w.text for w in wanted], sizes.text), slots([w.image for w in wanted], sizes.image))


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Which texts of a sample are fused with which images; one may take part in several pairs, or in none.

    Each function turns segments of the sizes `views` into those of the sizes `pairs`, whatever their tokens hold:
    (B, T, …) or (B, I, …) → (B, tokens of the pairs, …).
    """

    text: Callable[[Array], Array]
    image: Callable[[Array], Array]
    views: Sizes
    pairs: Sizes


class CoAttentionLayer(nnx.Module):
    """Both streams read the other's previous output: `x', y' = text(x, y), image(y, x)`."""

    def __init__(self, config: FusionConfig, precision: Precision, rngs: nnx.Rngs):
        c = config
        layer = PostNormConfig(c.width, c.heads, c.mlp_width, c.epsilon, c.dropout, c.attention_dropout, c.attention)
        self.text = PostNormLayer(layer, True, precision, rngs)
        self.image = PostNormLayer(layer, True, precision, rngs)

    def __call__(
        self, text, image, text_mask, key, sizes: Sizes | None = None, wanted: WantedSlots | None = None
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B R D"]]:
        """(B, T, D) and (B, I, D) in segments of these `sizes`, one each without → the same, or the tokens `wanted`."""
        text_key, image_key = split_key(key, 2)
        text_wanted, image_wanted = wanted or (None, None)
        texts, images = sizes or (text.shape[1:2], image.shape[1:2])
        return (
            self.text(text, text_mask, image, None, text_key, (texts, images), text_wanted),
            self.image(image, None, text, text_mask, image_key, (images, texts), image_wanted),
        )

    def of_pairs(
        self, texts_and_images: tuple[Array, Array], key, *, text_mask, pairing: Pairing
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B I D"]]:
        """The layer for pairs of what has not met before: what a stream computes alone is computed once, not by pair.

        That is self-attention, and the projections for cross-attention.
        """
        text, image = texts_and_images
        views, pairs = pairing.views, pairing.pairs
        (text_key, *text_keys), (image_key, *image_keys) = (split_key(k, 3) for k in split_key(key, 2))
        own_text = self.text.attention(text, None, text_mask, text_key, Segments(views.text, views.text))
        own_image = self.image.attention(image, None, None, image_key, Segments(views.image, views.image))
        asked, keys, values = self.text.cross_attention.project(own_text, image)
        of_text = pairing.text(asked), pairing.image(keys), pairing.image(values)
        asked, keys, values = self.image.cross_attention.project(own_image, text)
        of_image = pairing.image(asked), pairing.text(keys), pairing.text(values)

        def meet(layer: PostNormLayer, own, projected, mask, keys, segments: Segments) -> Array:
            cross_key, mlp_key = keys
            x = layer.cross_attention.read(own, projected, mask, cross_key, segments)
            return layer.feed_forward(x, mlp_key)

        mask, text_reads, image_reads = pairing.text(text_mask), Segments(*pairs), Segments(pairs.image, pairs.text)
        return (
            meet(self.text, pairing.text(own_text), of_text, None, text_keys, text_reads),
            meet(self.image, pairing.image(own_image), of_image, mask, image_keys, image_reads),
        )


class FusionEncoder(nnx.Module):
    """Linear maps into the common width, token types, co-attention layers, poolers."""

    def __init__(self, config: FusionConfig, text_width: int, image_width: int, precision: Precision, rngs: nnx.Rngs):
        c = config
        self.text_transform = precision.linear(text_width, c.width, precision.bert_init, rngs)
        self.image_transform = precision.linear(image_width, c.width, precision.bert_init, rngs)
        self.token_type = nnx.Param(precision.bert_init(rngs.params(), (c.token_types, c.width), precision.param_dtype))
        self.layers = Stack(lambda rngs: CoAttentionLayer(c, precision, rngs), c.layers, c.remat, rngs, c.unroll)
        self.text_pooler = precision.linear(c.width, c.width, precision.bert_init, rngs)
        self.image_pooler = precision.linear(c.width, c.width, precision.bert_init, rngs)
        self.joins_pairs = takes_parts(c.attention)  # of different lengths

    def add_types(
        self, text: Float[Array, "B T D"], image: Float[Array, "B I D"], image_type: int = IMAGE_TYPE
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B I D"]]:
        """The inputs of the first layer: transformed tokens plus their token-type row."""
        types = self.token_type[...]
        of_text, of_image = (spread(types[t], x.shape, x.dtype) for t, x in ((TEXT_TYPE, text), (image_type, image)))
        return text + of_text, image + of_image

    def __call__(
        self,
        text: Float[Array, "B L D"],
        text_mask: Bool[Array, "B L"],
        image: Float[Array, "B N D"],
        frames: int,
        key: Key[Array, ""] | None = None,
        image_type: int = IMAGE_TYPE,
        wanted: Wanted | None = None,
    ) -> Fused:
        """Fuses transformed tokens, row by row; `frames` of the visual tokens are [CLS], `key` switches dropout on.

        `wanted`: which tokens of the result are read; all without it.
        """
        sizes = Sizes(text.shape[1:2], image.shape[1:2])
        slots = None if wanted is None else wanted_side_by_side([wanted], sizes)
        x, y = self.encode(self.add_types(text, image, image_type), text_mask, sizes, key, slots)
        return Fused(x, y, frames)

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
        """Fuses the pairs of a `pairing`, each of which has its own `wanted` tokens, and no others."""
        sizes, xy = pairing.pairs, self.add_types(text, image)
        first = None
        if self.layers.depth > 1:
            first = partial(CoAttentionLayer.of_pairs, text_mask=text_mask, pairing=pairing)
        else:  # the only layer is rather computed at the tokens that are wanted
            xy = pairing.text(xy[0]), pairing.image(xy[1])
        slots = wanted_side_by_side(wanted, sizes)
        found = self.encode(xy, pairing.text(text_mask), sizes, key, slots, first)
        texts, images = (jax.lax.split(x, s.lengths, axis=1) for x, s in zip(found, slots, strict=True))
        return [Fused(x, y, frames) for x, y in zip(texts, images, strict=True)]

    def encode(
        self,
        xy: tuple[Array, Array],
        text_mask: Bool[Array, "B T"],
        sizes: Sizes,
        key: Key[Array, ""] | None,
        wanted: WantedSlots | None = None,
        first: Callable | None = None,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B R D"]]:
        """The layers, the last of them at the tokens `wanted`; `first` stands for the first one."""

        def apply(layer: CoAttentionLayer, xy, key, wanted: WantedSlots | None = None):
            x, y = xy
            return layer(x, y, text_mask, key, sizes, wanted)

        last = None if wanted is None else partial(apply, wanted=wanted)
        return self.layers(xy, apply, key, first=first, last=last)

    def cross_attention_maps(
        self,
        text: Float[Array, "B L D"],
        text_mask: Bool[Array, "B L"],
        image: Float[Array, "B N D"],
        image_type: int = IMAGE_TYPE,
    ) -> Float[Array, "B H L N"]:
        """Text → image attention weights of the last layer's text stream (no dropout)."""
        x, y = self.add_types(text, image, image_type)

        def layer_with_weights(layer: CoAttentionLayer, state, _):
            x, y, _ = state
            own = layer.text.attention(x, None, text_mask, None)
            query, key, _ = layer.text.cross_attention.project(own, y)
            return *layer(x, y, text_mask, None), attention_weights(query, key, None)

        heads = self.layers.each.text.attention.qkv.heads
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        empty = jnp.zeros((x.shape[0], heads, x.shape[1], y.shape[1]), dtype)
        return self.layers((x, y, empty), layer_with_weights)[2]

    def pool(self, fused: Fused) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        """`tanh(Linear(global token))` of the text and of the image (its frames' [CLS] averaged)."""
        text = jnp.tanh(self.text_pooler(fused.text_global))
        image = jnp.tanh(self.image_pooler(fused.frame_globals.mean(axis=1)))
        return text, image

    def joint(self, fused: Fused) -> Float[Array, "B J"]:
        """concat(pooled text, pooled image)."""
        return jnp.concatenate(self.pool(fused), axis=-1)
