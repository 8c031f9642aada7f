"""Masks: everything random in the views of a batch, drawn from keys that are folded by name.

Axes: B batch, P patches of a frame, L text tokens, S kept patches, R replaced patches, M language slots, T completion
slots.
"""

from __future__ import annotations

import dataclasses
import zlib

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from scl_jax.models.heads import unit
from scl_jax.partition import split_batch
from scl_jax.types import Batch


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
    """Tokens of whole random words, up to a share `ratio` of a text's tokens (at least one word).

    Words come in random order and are taken while the sum of their tokens stays within the quota
    `max(1, round(ratio · n))`, n counting neither special tokens nor padding; the first word is always taken. The first
    word that does not fit ends the selection: it is not skipped for a shorter one that would fit. So where words have
    several tokens, the quota is often not used up, and the share taken is below `ratio` (pre-training's 15 %). Words of
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
