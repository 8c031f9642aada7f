"""Views: every masked or clean version of the images and texts of a batch, each encoded once.

    vision   full · dropped (80 % of the patches left out) · replaced (30 % of the patches become the mask vector)
    text     full · masked for language modelling (15 %, whole words) · masked for completion (40 %)
    pairs    matching (full or other, full) · language (full, language-masked) · dropped (dropped, full)
             · replaced (replaced, full) · completion (full, completion-masked)

What is random in them comes from `masks.py:draw_masks`. `encode_views` runs the encoders, `fuse_pairs` the fusion
encoder, whose first layer makes pairs of the views (`pair_up`). What is of one sample goes through a network together:
views of one shape next to each other, (B, V, …) → (B·V, …), views and pairs of different lengths side by side along the
axis of tokens (`vision.py:side_by_side`, `models/segments.py`). Either keeps a sample on its device.

Axes: B batch, F frames, P patches of a frame, L text tokens, N visual tokens, D width, S kept patches, R replaced
patches, M language slots, T completion slots, V views that share a pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from scl_jax.models.fusion import Fused, Pairing, Sizes, Wanted, global_tokens
from scl_jax.models.layers import split_key
from scl_jax.models.scl import SCL
from scl_jax.models.segments import Lengths
from scl_jax.models.vision import ImageViews
from scl_jax.objectives.masks import Masks, group_shape
from scl_jax.partition import split_batch
from scl_jax.types import Batch

OBJECTIVES = (
    "contrastive",
    "matching",
    "masked_language",
    "global_vision",
    "global_text",
    "local_vision",
    "local_text",
)
# which fused pairs an objective reads
PAIRS_OF = {
    "contrastive": (),
    "matching": ("matching",),
    "masked_language": ("language",),
    "global_vision": ("dropped", "completion"),
    "global_text": ("dropped", "completion"),
    "local_vision": ("replaced", "completion"),
    "local_text": ("dropped", "completion"),
}
# of what views they are made
TEXT_OF = {
    "matching": "full",
    "language": "language",
    "replaced": "full",
    "completion": "completion",
    "dropped": "full",
}
IMAGES_OF = {
    "matching": ("full", "false"),
    "language": ("full",),
    "replaced": ("replaced",),
    "completion": ("full",),
    "dropped": ("dropped",),
}


def pairs_needed(active: Collection[str]) -> tuple[str, ...]:
    """The fused pairs that the `active` objectives read, in a fixed order: a set's is another one in every process."""
    needed = {pair for name in active for pair in PAIRS_OF[name]}
    return tuple(pair for pair in TEXT_OF if pair in needed)


def interleave(views: list[Array]) -> Array:
    """V arrays (B, …) → (B·V, …), the views of a sample next to each other."""
    x = jnp.stack(views, axis=1)
    return split_batch(x.reshape(-1, *x.shape[2:]))


def separate(x: Array, count: int) -> list[Array]:
    """(B·V, …) → V arrays (B, …), undoing `interleave`."""
    x = split_batch(x.reshape(-1, count, *x.shape[1:]))
    return [x[:, view] for view in range(count)]


@flax.struct.dataclass
class Views:
    """Encoded views by name: images (B, N, D) and texts (B, L, D), in the fusion width."""

    images: dict[str, Float[Array, "B N_ D"]]
    texts: dict[str, Float[Array, "B L D"]]
    frames: int = flax.struct.field(pytree_node=False)


def encode_views(
    model: SCL, batch: Batch, masks: Masks, pairs: Collection[str], key: Key[Array, ""] | None = None
) -> Views:
    """Encodes the views that `pairs` read (and always the clean ones), each once; `key` switches dropout on."""
    pixels = {"full": batch.pixels}  # what shares a pass: name → pixels
    if "replaced" in pairs:
        pixels["replaced"] = batch.pixels
    if "matching" in pairs and batch.false_pixels is not None:
        pixels["false"] = batch.false_pixels
    replaced = None
    if "replaced" in pairs:
        none = jnp.zeros_like(masks.replaced)
        replaced = interleave([masks.replaced if name == "replaced" else none for name in pixels])
    views = [ImageViews(interleave(list(pixels.values())), replaced=replaced, count=len(pixels))]
    if "dropped" in pairs:
        views.append(ImageViews(batch.pixels, keep=masks.keep))
    encoded, *dropped = model.encode_images(views)
    images = dict(zip(pixels, separate(encoded, len(pixels)), strict=True))
    if dropped:
        (images["dropped"],) = dropped

    ids = {"full": batch.token_ids}
    if "language" in pairs:
        ids["language"] = masks.language_ids
    if "completion" in pairs:
        ids["completion"] = masks.completion_ids
    text_mask = interleave([batch.token_mask] * len(ids))
    encoded = model.encode_text(interleave(list(ids.values())), text_mask, key)
    texts = dict(zip(ids, separate(encoded, len(ids)), strict=True))
    return Views(images, texts, batch.pixels.shape[1])


def take_partner(x: Float[Array, "B ..."], partner: Int[Array, " B"], group_size: int) -> Float[Array, "B ..."]:
    """Rows of `x` by index within each group; nothing crosses groups."""
    groups, size = group_shape(partner.shape[0], group_size)
    grouped = x.reshape(groups, size, *x.shape[1:])
    index = partner.reshape(groups, size, *[1] * (x.ndim - 1))
    return jnp.take_along_axis(grouped, index, axis=1).reshape(x.shape)


def wanted_tokens(masks: Masks, pairs: Collection[str], frames: int) -> dict[str, Wanted]:
    """The tokens of every pair that an objective reads: the [CLS], and the slots of what is to be recovered."""
    everyone = global_tokens(masks.partner.shape[0], frames)
    patches = masks.replaced.shape[-1]
    offsets = frames + patches * jnp.arange(frames)[:, None]  # of a frame's patches among the visual tokens
    slots = (masks.replaced_slots[:, None] + offsets).reshape(masks.replaced_slots.shape[0], -1)  # (B, F·R)
    text_slots = {"language": masks.language_slots, "completion": masks.completion_slots}
    text_slots["dropped"] = masks.completion_slots
    image_slots = {"replaced": slots, "completion": slots} if "replaced" in pairs else {}

    def after(first: Array, more: Array | None) -> Array:
        return first if more is None else jnp.concatenate([first, more.astype(first.dtype)], axis=1)

    return {
        n: Wanted(after(everyone.text, text_slots.get(n)), after(everyone.image, image_slots.get(n))) for n in pairs
    }


def pair_up(
    pairs: Collection[str],
    texts: Mapping[str, Float[Array, "B L D"]],
    images: Mapping[str, Float[Array, "B _ D"]],
    masks: Masks,
    group_size: int,
) -> Pairing:
    """From the views `texts` and `images`, side by side in their order, to the `pairs` side by side."""
    length_of = {name: x.shape[1] for name, x in images.items()}
    views = Sizes(tuple(x.shape[1] for x in texts.values()), tuple(length_of.values()))

    def named(x: Array, names: Collection[str], lengths: Lengths) -> dict[str, Array]:
        return dict(zip(names, jax.lax.split(x, lengths, axis=1), strict=True))

    def text_segments(x: Array) -> Array:
        of = named(x, texts, views.text)
        return jnp.concatenate([of[TEXT_OF[pair]] for pair in pairs], axis=1)

    def other_image(of: dict[str, Array]) -> Array:
        if "false" not in of:
            return take_partner(of["full"], masks.partner, group_size)
        is_pair = masks.is_pair.reshape(-1, *[1] * (of["full"].ndim - 1))
        return jnp.where(is_pair, of["full"], of["false"])

    def image_segments(x: Array) -> Array:
        of = named(x, images, views.image)
        return jnp.concatenate([other_image(of) if p == "matching" else of[IMAGES_OF[p][0]] for p in pairs], axis=1)

    lengths = Sizes(
        tuple(texts[TEXT_OF[pair]].shape[1] for pair in pairs), tuple(length_of[IMAGES_OF[p][0]] for p in pairs)
    )
    return Pairing(text_segments, image_segments, views, lengths)


def fuse_pairs(
    model: SCL,
    batch: Batch,
    views: Views,
    masks: Masks,
    pairs: Collection[str],
    group_size: int,
    key: Key[Array, ""] | None = None,
) -> dict[str, Fused]:
    """Fuses the named `pairs` of encoded views; `key` switches dropout on. Each has its `wanted_tokens`, no others.

    All side by side, or, where that would copy, the dropped pair, whose image is shorter, apart from the others.
    """
    wanted = wanted_tokens(masks, pairs, views.frames)
    together = [list(pairs)]
    if not model.fusion.joins_pairs:
        together = [[name for name in pairs if name != "dropped"], [name for name in pairs if name == "dropped"]]
    fused = {}
    for names, pass_key in zip(together, split_key(key, len(together)), strict=True):
        if not names:
            continue
        texts = {view: x for view, x in views.texts.items() if any(view == TEXT_OF[pair] for pair in names)}
        images = {view: x for view, x in views.images.items() if any(view in IMAGES_OF[pair] for pair in names)}
        results = model.fuse_pairs(
            jnp.concatenate(list(texts.values()), axis=1),
            jnp.concatenate([batch.token_mask] * len(texts), axis=1),
            jnp.concatenate(list(images.values()), axis=1),
            views.frames,
            pair_up(names, texts, images, masks, group_size),
            [wanted[name] for name in names],
            pass_key,
        )
        fused |= dict(zip(names, results, strict=True))
    return fused
