"""Views: every masked or clean version of the images and texts of a batch, each encoded once.

    vision   full · dropped (80 % of the patches left out) · replaced (30 % of the patches become the mask vector)
    text     full · masked for language modelling (15 %, whole words) · masked for completion (40 %)
    pairs    matching (full or other, full) · language (full, language-masked) · dropped (dropped, full)
             · replaced (replaced, full) · completion (full, completion-masked)

`draw_masks` decides everything random, `encode_views` runs the encoders, `fuse_pairs` the fusion encoder, whose first
layer makes pairs of the views (`pair_up`). What is of one sample goes through a network together: views of one shape
next to each other, (B, V, …) → (B·V, …), views and pairs of different lengths side by side along the axis of tokens
(`vision.py:side_by_side`, `models/segments.py`). Either keeps a sample on its device.

Axes: B batch, F frames, P patches of a frame, L text tokens, N visual tokens, D width, S kept patches, R replaced
patches, M language slots, T completion slots, V views that share a pass.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Collection, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from scl_jax.models.fusion import Fused, Pairing, Sizes, Wanted, global_tokens
from scl_jax.models.heads import unit
from scl_jax.models.layers import split_key
from scl_jax.models.scl import SCL
from scl_jax.models.segments import Lengths
from scl_jax.models.vision import ImageViews
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
TEXTS_OF = {
    "matching": ("full",),
    "language": ("language",),
    "replaced": ("full",),
    "completion": ("completion",),
    "dropped": ("full",),
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
    return tuple(pair for pair in TEXTS_OF if pair in needed)


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """Shares that are masked, ids of the tokenizer, and the size of a group (samples)."""

    vocab_size: int
    mask_id: int
    special_ids: int = 5  # ids below this (and the mask's) never replace a word
    drop_ratio: float = 0.8
    replace_ratio: float = 0.3
    language_ratio: float = 0.15
    text_ratio: float = 0.4
    group_size: int = 16
    hard_negatives: float = 0.0  # share of matching's other images drawn by contrastive similarity, not evenly


@flax.struct.dataclass
class Masks:
    """Everything random in the views of one batch. Slots hold token positions; `*_valid` says which slots count.

    Under gradient accumulation a leading axis A counts micro-batches.
    """

    keep: Int[Array, "*A B S"]  # patches that the dropped view encodes
    replaced: Bool[Array, "*A B P"]  # patches that the replaced view replaces
    replaced_slots: Int[Array, "*A B R"]  # the same as positions
    language_ids: Int[Array, "*A B L"]  # the text corrupted for masked language modelling
    language_slots: Int[Array, "*A B M"]
    language_valid: Bool[Array, "*A B M"]
    completion_ids: Int[Array, "*A B L"]  # the text corrupted for completion
    completion_slots: Int[Array, "*A B T"]
    completion_valid: Bool[Array, "*A B T"]
    partner: Int[Array, "*A B"]  # whose image a text is matched with, in its group
    is_pair: Bool[Array, "*A B"]  # whether that is its own
    # for hard negatives: which rows draw their partner by similarity, and Gumbel noise (-inf where no partner)
    hard: Bool[Array, "*A B"] | None = None
    partner_noise: Float[Array, "*A B size"] | None = None


def named_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """An independent key for `name`: another objective's randomness does not move when one is added or removed."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def draw_uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform in [0, 1); every device draws, and later sorts, the rows of its own samples only."""
    return split_batch(jax.random.uniform(key, shape))


def group_shape(batch: int, group_size: int) -> tuple[int, int]:
    """(groups, samples of a group); a batch smaller than a group is one group."""
    size = min(group_size, batch)
    if batch % size:
        raise ValueError(f"a batch of {batch} does not divide into groups of {size} (objectives.group_size)")
    return batch // size, size


def draw_masks(batch: Batch, patches: int, key: Key[Array, ""], spec: MaskSpec) -> Masks:
    """Draws all masks of a batch whose images have `patches` patches a frame, from keys folded from `key` by name."""
    keep = draw_kept_patches(named_key(key, "drop"), batch.weight.shape[0], patches, spec.drop_ratio)
    replaced, replaced_slots = draw_replaced_patches(
        named_key(key, "replace"), batch.weight.shape[0], patches, spec.replace_ratio
    )
    language_slots, language_valid = draw_whole_words(
        named_key(key, "language_words"), batch.word_ids, spec.language_ratio
    )
    language_ids = corrupt(named_key(key, "language_ids"), batch.token_ids, language_slots, language_valid, spec)
    slots, valid = draw_completion_tokens(named_key(key, "completion"), batch.word_ids, spec.text_ratio)
    is_pair, partner, noise = draw_partners(named_key(key, "matching"), batch, spec.group_size)
    masks = Masks(
        keep=keep,
        replaced=replaced,
        replaced_slots=replaced_slots,
        language_ids=language_ids,
        language_slots=language_slots,
        language_valid=language_valid,
        completion_ids=put(batch.token_ids, slots, valid, spec.mask_id),
        completion_slots=slots,
        completion_valid=valid,
        partner=partner,
        is_pair=is_pair,
    )
    if not spec.hard_negatives:
        return masks
    hard = draw_uniform(named_key(key, "hard_negatives"), is_pair.shape) < spec.hard_negatives
    return dataclasses.replace(masks, hard=hard, partner_noise=noise)


def draw_kept_patches(key: Key[Array, ""], batch: int, patches: int, drop_ratio: float) -> Int[Array, "B S"]:
    """`int(P·(1-ratio))` random patches of each sample (METHOD section 1: 324 → 64, 196 → 39)."""
    order = jnp.argsort(draw_uniform(key, (batch, patches)), axis=1)
    return order[:, : int(patches * (1 - drop_ratio))]


def draw_replaced_patches(
    key: Key[Array, ""], batch: int, patches: int, replace_ratio: float
) -> tuple[Bool[Array, "B P"], Int[Array, "B R"]]:
    """`int(ratio·P)` random patches of each sample, as a mask and as positions."""
    count = int(replace_ratio * patches)
    order = jnp.argsort(draw_uniform(key, (batch, patches)), axis=1)
    rank = jnp.argsort(order, axis=1)
    return rank < count, order[:, :count]


def draw_completion_tokens(
    key: Key[Array, ""], word_ids: Int[Array, "B L"], ratio: float
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """`int(n·ratio) + 1` distinct random tokens of the n between `<s>` and `</s>`; none where n = 0."""
    length = word_ids.shape[1]
    words = word_ids >= 0
    order = jnp.argsort(jnp.where(words, draw_uniform(key, word_ids.shape), 2.0), axis=1)
    slots = order[:, : int((length - 2) * ratio) + 1]
    tokens = words.sum(axis=1, keepdims=True)
    count = jnp.where(tokens > 0, jnp.floor(tokens * ratio + 1e-6).astype(jnp.int32) + 1, 0)
    return slots, jnp.arange(slots.shape[1])[None] < count


def draw_whole_words(
    key: Key[Array, ""], word_ids: Int[Array, "B L"], ratio: float
) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """Tokens of whole random words, as many as fit into a share `ratio` of a text's tokens (at least one word).

    Words come in random order and are taken while the sum of their tokens stays within the quota
    `max(1, round(ratio · n))`, n counting neither special tokens nor padding; the first word is always taken. Words of
    more tokens than there are slots come last: one is taken, and cut, only where a text has no other.
    """
    length = word_ids.shape[1]
    slots = min(max(4, round(ratio * (length - 2))), length)  # room for a word of four tokens in a short text, too
    tokens = (word_ids >= 0).sum(axis=1, keepdims=True)
    quota = jnp.where(tokens > 0, jnp.maximum(1, jnp.round(ratio * tokens)), 0)
    # a random score per word, the same for all its tokens, so that sorting tokens keeps words together
    word_score = draw_uniform(key, word_ids.shape)
    score = jnp.take_along_axis(word_score, jnp.maximum(word_ids, 0), axis=1)
    tokens_of_word = (word_ids[:, :, None] == word_ids[:, None, :]).sum(axis=2)
    score = jnp.where(tokens_of_word > slots, score + 1.0, score)
    order = jnp.argsort(jnp.where(word_ids >= 0, score, 3.0), axis=1, stable=True)
    sorted_words = jnp.take_along_axis(word_ids, order, axis=1)
    position = jnp.arange(length)[None]
    same = (sorted_words[:, :, None] == sorted_words[:, None, :]) & (sorted_words[:, :, None] >= 0)
    word_end = jnp.max(jnp.where(same, position[:, None, :] + 1, 0), axis=2)  # tokens up to the end of one's word
    first = sorted_words == sorted_words[:, :1]
    chosen = (sorted_words >= 0) & ((word_end <= quota) | first)
    return order[:, :slots], chosen[:, :slots]


def put(ids: Int[Array, "B L"], slots: Int[Array, "B S"], valid: Bool[Array, "B S"], value) -> Int[Array, "B L"]:
    """`ids` with `value` (a number, or one per slot) written at the valid slots."""
    length = ids.shape[1]
    target = jnp.where(valid, slots, length)  # an index past the end is dropped
    rows = jnp.arange(ids.shape[0])[:, None]
    return ids.at[rows, target].set(jnp.asarray(value, ids.dtype), mode="drop")


def corrupt(key, ids, slots, valid, spec: MaskSpec) -> Int[Array, "B L"]:
    """BERT's corruption of the chosen tokens: 80 % become the mask, 10 % a random token, 10 % stay."""
    choice_key, token_key = jax.random.split(key)
    choice = draw_uniform(choice_key, slots.shape)
    mask_among_words = int(spec.mask_id >= spec.special_ids)  # RoBERTa's is the last token, our tokenizers' the fifth
    random_ids = jax.random.randint(token_key, slots.shape, spec.special_ids, spec.vocab_size - mask_among_words)
    random_ids += (random_ids >= spec.mask_id) * mask_among_words  # never the mask itself
    old = jnp.take_along_axis(ids, slots, axis=1)
    new = jnp.where(choice < 0.8, spec.mask_id, jnp.where(choice < 0.9, random_ids, old))
    return put(ids, slots, valid, new)


def draw_partners(
    key: Key[Array, ""], batch: Batch, group_size: int
) -> tuple[Bool[Array, " B"], Int[Array, " B"], Float[Array, "B size"]]:
    """Half of a group keeps its image, the others get that of another member, which the text does not describe.

    That is never the same item, never one with the same text, never padding. A sample without such a member keeps its
    own image and is a true pair.

    Returns:
        is_pair: whether the image is the text's own.
        partner: index within the group of the sample whose image is taken.
        noise: what chose the partner (the largest wins), -inf where a member cannot be the partner.
    """
    groups, size = group_shape(batch.item_id.shape[0], group_size)
    half_key, partner_key = jax.random.split(key)
    keeps = jnp.argsort(jnp.argsort(draw_uniform(half_key, (groups, size)), axis=1), axis=1) < (size + 1) // 2
    items, real = batch.item_id.reshape(groups, size), batch.weight.reshape(groups, size) > 0
    texts = batch.token_ids.reshape(groups, size, -1)
    same_text = (texts[:, :, None] == texts[:, None, :]).all(axis=-1)
    allowed = (items[:, :, None] != items[:, None, :]) & ~same_text & real[:, None, :]
    noise = jnp.where(allowed, split_batch(jax.random.gumbel(partner_key, allowed.shape)), -jnp.inf)
    is_pair = keeps | ~allowed.any(axis=2)
    partner = jnp.where(is_pair, jnp.arange(size)[None], jnp.argmax(noise, axis=2))
    return is_pair.reshape(-1), partner.reshape(-1), noise.reshape(-1, size)


def harden_partners(
    masks: Masks, text: Float[Array, "B E"], image: Float[Array, "B E"], temperature: Float[Array, ""]
) -> Masks:
    """Hard rows draw their partner in proportion to exp(cos(text, image) / temperature); `is_pair` stays."""
    if masks.hard is None or masks.partner_noise is None:
        return masks
    size = masks.partner_noise.shape[1]
    texts, images = (unit(jax.lax.stop_gradient(x)).reshape(-1, size, x.shape[-1]) for x in (text, image))
    logits = jnp.einsum("gte,gie->gti", texts, images) / jax.lax.stop_gradient(temperature)
    hardest = jnp.argmax(masks.partner_noise + logits.reshape(-1, size), axis=1)
    hard = masks.hard & ~masks.is_pair
    return dataclasses.replace(masks, partner=jnp.where(hard, hardest, masks.partner))


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
        return jnp.concatenate([of[TEXTS_OF[pair][0]] for pair in pairs], axis=1)

    def other_image(of: dict[str, Array]) -> Array:
        if "false" not in of:
            return take_partner(of["full"], masks.partner, group_size)
        is_pair = masks.is_pair.reshape(-1, *[1] * (of["full"].ndim - 1))
        return jnp.where(is_pair, of["full"], of["false"])

    def image_segments(x: Array) -> Array:
        of = named(x, images, views.image)
        return jnp.concatenate([other_image(of) if p == "matching" else of[IMAGES_OF[p][0]] for p in pairs], axis=1)

    lengths = Sizes(
        tuple(texts[TEXTS_OF[pair][0]].shape[1] for pair in pairs), tuple(length_of[IMAGES_OF[p][0]] for p in pairs)
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
        texts = {view: x for view, x in views.texts.items() if any(view in TEXTS_OF[pair] for pair in names)}
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
