"""Masks and partners are those of METHOD sections 1 and 4, whatever else is drawn and wherever it is computed.

Axes: B batch, P patches, L text tokens.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scl_jax.objectives.masks import (
    Masks,
    MaskSpec,
    draw_kept_patches,
    draw_masks,
    draw_partners,
    draw_replaced_patches,
    draw_whole_words,
    group_shape,
    harden_partners,
)
from scl_jax.objectives.views import PAIRS_OF, pairs_needed, take_partner
from scl_jax.types import Batch

B, L, PATCHES = 64, 50, 36
VOCAB, MASK_ID = 300, 299
SPEC = MaskSpec(VOCAB, MASK_ID, group_size=16)
NAMES = [field.name for field in dataclasses.fields(Masks) if field.name not in ("hard", "partner_noise")]


def make_batch(lengths, *, word_length: int = 1, seed: int = 0, item_id=None) -> Batch:
    """Texts of `lengths` tokens, <s> and </s> included, whose words have `word_length` tokens."""
    lengths = np.asarray(lengths)[:, None]
    position = np.arange(L)[None]
    inside = (position >= 1) & (position < lengths - 1)
    ids = np.random.default_rng(seed).integers(5, MASK_ID, (len(lengths), L))
    ids = np.where(inside, ids, np.where(position == 0, 0, np.where(position == lengths - 1, 2, 1)))
    return Batch(
        pixels=jnp.zeros((len(lengths), 1, 8, 8, 3), jnp.uint8),
        token_ids=jnp.asarray(ids),
        token_mask=jnp.asarray(position < lengths),
        word_ids=jnp.asarray(np.where(inside, (position - 1) // word_length, -1)),
        weight=jnp.ones(len(lengths)),
        item_id=jnp.arange(len(lengths)) if item_id is None else jnp.asarray(item_id),
    )


@lru_cache
def all_lengths() -> Batch:
    """Every length from the empty text (2 tokens) to the longest (50), and some again."""
    return make_batch(2 + np.arange(B) % (L - 1))


draw = jax.jit(draw_masks, static_argnums=(1, 3))
draw_words = jax.jit(draw_whole_words, static_argnums=2)


def arrays(masks: Masks) -> SimpleNamespace:
    """The masks as NumPy arrays; hard negatives are off."""
    return SimpleNamespace(**{name: np.asarray(getattr(masks, name)) for name in NAMES})


@lru_cache
def drawn(seed: int = 0) -> SimpleNamespace:
    return arrays(draw(all_lengths(), PATCHES, jax.random.key(seed), SPEC))


def chosen_positions(slots: np.ndarray, valid: np.ndarray, row: int) -> list[int]:
    return [int(slot) for slot, counts in zip(slots[row], valid[row], strict=True) if counts]


@pytest.mark.parametrize(("patches", "kept"), [(324, 64), (196, 39), (25, 4)])
def test_a_fifth_of_the_patches_is_kept_counted_in_double_precision(patches, kept):
    keep = np.asarray(draw_kept_patches(jax.random.key(0), 3, patches, 0.8))
    assert keep.shape == (3, kept)
    for row in keep:
        assert len(set(row)) == kept and row.min() >= 0 and row.max() < patches
    assert (keep[0] != keep[1]).any()


@pytest.mark.parametrize(("patches", "count"), [(324, 97), (196, 58), (25, 7), (16, 4)])
def test_three_tenths_of_the_patches_are_replaced(patches, count):
    assert count == int(0.3 * patches)
    replaced, slots = map(np.asarray, draw_replaced_patches(jax.random.key(0), 3, patches, 0.3))
    for mask, positions in zip(replaced, slots, strict=True):
        assert len(positions) == count
        assert set(positions) == set(np.flatnonzero(mask))


def test_every_patch_is_as_likely_to_be_kept_and_to_be_replaced():
    rows = 20_000
    keep = np.asarray(draw_kept_patches(jax.random.key(1), rows, 25, 0.8))
    np.testing.assert_allclose(np.bincount(keep.ravel(), minlength=25) / rows, 4 / 25, atol=0.015)
    replaced, _ = draw_replaced_patches(jax.random.key(1), rows, 25, 0.3)
    np.testing.assert_allclose(np.asarray(replaced).mean(axis=0), 7 / 25, atol=0.015)


def test_completion_masks_distinct_tokens_and_never_special_ones():
    batch, masks = all_lengths(), drawn()
    for row, length in enumerate(np.asarray(batch.token_mask).sum(axis=1)):
        positions = chosen_positions(masks.completion_slots, masks.completion_valid, row)
        expected = int((length - 2) * 0.4) + 1 if length > 2 else 0  # METHOD section 4
        assert len(set(positions)) == len(positions) == expected, f"a text of {length} tokens"
        assert all(1 <= position < length - 1 for position in positions)
        ids = np.array(batch.token_ids[row])
        ids[positions] = MASK_ID
        np.testing.assert_array_equal(masks.completion_ids[row], ids)


def test_nothing_is_masked_in_an_empty_text():
    empty, masks = np.asarray(all_lengths().word_ids < 0).all(axis=1), drawn()
    assert empty.any()
    assert not masks.language_valid[empty].any() and not masks.completion_valid[empty].any()
    for ids in (masks.language_ids, masks.completion_ids):
        np.testing.assert_array_equal(ids[empty], np.asarray(all_lengths().token_ids)[empty])


@pytest.mark.parametrize("word_length", [1, 2, 3])
def test_whole_words_are_chosen_together_and_at_least_one(word_length):
    batch = make_batch(np.maximum(2 + np.arange(B) % (L - 1), 3), word_length=word_length)
    words = np.asarray(batch.word_ids)
    slots, valid = map(np.asarray, draw_words(jax.random.key(3), batch.word_ids, 0.15))
    for row in range(B):
        positions = chosen_positions(slots, valid, row)
        assert positions and len(set(positions)) == len(positions)
        chosen = {int(words[row, position]) for position in positions}
        assert -1 not in chosen
        assert set(positions) == set(np.flatnonzero(np.isin(words[row], list(chosen))))


def test_a_word_longer_than_the_quota_of_a_short_text_is_masked_whole():
    words = jnp.asarray([[-1, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1]])
    slots, valid = draw_words(jax.random.key(0), words, 0.15)
    assert int(valid.sum()) == 4, "half a word is easily guessed from the other half"


def test_a_word_that_has_no_room_is_taken_only_where_there_is_no_other():
    """Four tokens of so short a text can be masked."""
    words = jnp.tile(jnp.asarray([[-1, 0, 0, 0, 0, 0, 0, 1, 1, 2, -1, -1]]), (20, 1))
    slots, valid = map(np.asarray, draw_words(jax.random.key(0), words, 0.15))
    assert all(set(chosen_positions(slots, valid, row)) in ({7, 8}, {9}) for row in range(20))
    alone = jnp.asarray([[-1, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1]])
    slots, valid = map(np.asarray, draw_words(jax.random.key(0), alone, 0.15))
    assert len(set(chosen_positions(slots, valid, 0))) == 4


@pytest.mark.parametrize("word_length", [1, 2])
def test_fifteen_per_cent_of_the_tokens_are_chosen_on_average(word_length):
    batch = make_batch(np.tile(np.arange(22, 51), 40), word_length=word_length)
    _, valid = draw_words(jax.random.key(4), batch.word_ids, 0.15)
    share = float(valid.sum()) / float((batch.word_ids >= 0).sum())
    assert share == pytest.approx(0.15, abs=0.025)


def test_every_word_is_as_likely_to_be_masked():
    batch = make_batch(np.full(4000, 22))  # 20 tokens: three are masked
    slots, valid = draw_words(jax.random.key(5), batch.word_ids, 0.15)
    counts = np.bincount(np.asarray(slots)[np.asarray(valid)], minlength=L)[1:21]
    np.testing.assert_allclose(counts / 4000, 0.15, atol=0.03)


@lru_cache
def corrupted() -> tuple[np.ndarray, np.ndarray]:
    """(original, replacement) of some 15,000 tokens chosen for language modelling."""
    batch = make_batch(np.full(2048, L))
    masks = draw(batch, PATCHES, jax.random.key(6), dataclasses.replace(SPEC, group_size=1))
    take = np.asarray(masks.language_valid)
    old, new = (
        np.take_along_axis(np.asarray(ids), np.asarray(masks.language_slots), axis=1)[take]
        for ids in (batch.token_ids, masks.language_ids)
    )
    return old, new


def test_eighty_per_cent_become_the_mask_ten_another_token_ten_stay():
    old, new = corrupted()
    masked, same = new == MASK_ID, new == old
    assert masked.mean() == pytest.approx(0.8, abs=0.015)
    assert same.mean() == pytest.approx(0.1, abs=0.012)
    assert (~masked & ~same).mean() == pytest.approx(0.1, abs=0.012)


def test_random_tokens_are_spread_over_the_vocabulary_and_never_special():
    old, new = corrupted()
    random_tokens = new[(new != MASK_ID) & (new != old)]
    assert random_tokens.min() >= 5 and random_tokens.max() < MASK_ID
    assert len(set(random_tokens)) > 0.9 * (MASK_ID - 5)


@pytest.mark.parametrize(
    "mask_id",
    [
        4,
        100,
        299,
    ],
    ids=["own tokenizer", "in the middle", "last, as RoBERTa's"],
)
def test_random_tokens_are_never_the_mask_wherever_it_stands(mask_id):
    spec = MaskSpec(VOCAB, mask_id, group_size=1, language_ratio=0.9)
    batch = make_batch(np.full(1024, L))
    batch = batch.replace(token_ids=jnp.where(batch.token_ids == mask_id, 50, batch.token_ids))
    masks = draw(batch, PATCHES, jax.random.key(7), spec)
    new = np.asarray(masks.language_ids)[np.asarray(batch.word_ids) >= 0]
    changed = np.asarray(batch.token_ids)[np.asarray(batch.word_ids) >= 0] != new
    assert (new == mask_id).sum() / changed.sum() == pytest.approx(0.8 / 0.9, abs=0.01)
    others = new[changed & (new != mask_id)]
    assert others.min() >= 5 and others.max() == VOCAB - 1 - (mask_id == VOCAB - 1)


def test_what_is_not_chosen_stays():
    masks, ids = drawn(), np.asarray(all_lengths().token_ids)
    for row in range(B):
        changed = np.flatnonzero(masks.language_ids[row] != ids[row])
        assert set(changed) <= set(chosen_positions(masks.language_slots, masks.language_valid, row))


match = jax.jit(draw_partners, static_argnums=2)


def partners(item_id, weight=None, group_size: int = 16, seed: int = 0, texts=None) -> tuple[np.ndarray, np.ndarray]:
    """Every text differs, unless `texts` numbers them."""
    size = len(item_id)
    batch = make_batch(np.full(size, 3), item_id=item_id)
    numbers = jnp.arange(size) if texts is None else jnp.asarray(texts)
    batch = batch.replace(token_ids=batch.token_ids.at[:, 1].set(numbers))
    if weight is not None:
        batch = batch.replace(weight=jnp.asarray(weight, jnp.float32))
    is_pair, partner, _ = map(np.asarray, match(jax.random.key(seed), batch, group_size))
    return is_pair, partner


def test_half_of_every_group_are_pairs_and_keep_their_own_image():
    is_pair, partner = partners(np.arange(64))
    np.testing.assert_array_equal(is_pair.reshape(4, 16).sum(axis=1), 8)
    np.testing.assert_array_equal(partner[is_pair], np.tile(np.arange(16), 4)[is_pair])
    assert (partner[~is_pair] != np.tile(np.arange(16), 4)[~is_pair]).all()
    is_pair, _ = partners(np.arange(9), group_size=3)
    np.testing.assert_array_equal(is_pair.reshape(3, 3).sum(axis=1), 2)  # of an odd number the larger half


def test_partners_are_never_the_same_item_never_padding_always_inside_the_group():
    rng = np.random.default_rng(0)
    for seed in range(20):
        items = rng.integers(0, 6, 64)  # many rows of one item
        weight = (rng.random(64) < 0.7).astype(np.float32)
        is_pair, partner = partners(items, weight, seed=seed)
        assert partner.min() >= 0 and partner.max() < 16
        other = np.repeat(np.arange(0, 64, 16), 16) + partner
        assert (items[other] != items)[~is_pair].all()
        assert (weight[other] > 0)[~is_pair].all()
        np.testing.assert_array_equal(other[is_pair], np.arange(64)[is_pair])


def test_an_image_with_the_same_text_is_never_the_other_image():
    """Two pictures of one caption: the caption is true of both."""
    texts = np.random.default_rng(0).integers(0, 4, 64)
    for seed in range(10):
        is_pair, partner = partners(np.arange(64), seed=seed, texts=texts)
        other = np.repeat(np.arange(0, 64, 16), 16) + partner
        assert (texts[other] != texts)[~is_pair].all()
    is_pair, _ = partners(np.arange(16), texts=np.zeros(16, int))
    assert is_pair.all()


def test_every_other_member_is_as_likely_a_partner():
    groups = 4000
    is_pair, partner = partners(np.arange(4 * groups), group_size=4)
    first = partner.reshape(groups, 4)[:, 0][~is_pair.reshape(groups, 4)[:, 0]]
    np.testing.assert_allclose(np.bincount(first, minlength=4) / len(first), [0, 1 / 3, 1 / 3, 1 / 3], atol=0.04)


@pytest.mark.parametrize(
    ("items", "weight"),
    [([7, 7, 7, 7], [1, 1, 1, 1]), ([1, 2, 3, 4], [1, 0, 0, 0]), ([5], [1])],
    ids=["one item", "the others are padding", "a batch of one"],
)
def test_a_sample_without_an_alternative_stays_a_pair(items, weight):
    is_pair, partner = partners(items, np.asarray(weight, np.float32), group_size=4)
    real = np.asarray(weight) > 0
    assert is_pair[real].all()
    np.testing.assert_array_equal(partner[real], np.arange(len(items))[real])


def test_hard_partners_follow_the_similarity_and_stay_allowed():
    """Half of the others are drawn in proportion to exp(cos / temperature), never the item itself nor padding."""
    groups, size = 3000, 4
    batch = make_batch(np.full(groups * size, 3), item_id=np.arange(groups * size) % size)
    batch = batch.replace(weight=batch.weight.reshape(groups, size).at[:, 3].set(0.0).reshape(-1))  # 3 is padding
    spec = dataclasses.replace(SPEC, group_size=size, hard_negatives=0.5)
    masks = draw(batch, 4, jax.random.key(0), spec)
    angles, of_images = np.array([0.0, 3.0, 0.2, 1.5]), np.array([2.5, 1.0, 2.0, 0.5])
    texts, images = (
        jnp.asarray(np.tile(np.stack([np.cos(x), np.sin(x)], axis=1), (groups, 1)), jnp.float32)
        for x in (angles, of_images)
    )
    hardened = jax.jit(harden_partners)(masks, texts, 3.0 * images, jnp.asarray(0.5))
    pairs = np.asarray(masks.is_pair)
    np.testing.assert_array_equal(np.asarray(hardened.partner)[pairs], (np.arange(groups * size) % size)[pairs])
    others = ~np.asarray(masks.is_pair) & (np.arange(groups * size) % size == 0)
    np.testing.assert_array_equal(masks.is_pair, hardened.is_pair)
    hard, soft = np.asarray(masks.hard)[others], np.asarray(hardened.partner)[others]
    assert hard.mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(soft[~hard], np.asarray(masks.partner)[others][~hard])
    odds = np.exp(np.cos(of_images[1:3]) / 0.5)  # the text of row 0 lies at the angle 0
    np.testing.assert_allclose(
        np.bincount(soft[hard], minlength=4) / hard.sum(), [0, *(odds / odds.sum()), 0], atol=0.05
    )


def test_taking_a_partner_stays_inside_the_group():
    x = jnp.arange(8.0).reshape(8, 1, 1)
    taken = take_partner(x, jnp.asarray([1, 0, 3, 2, 0, 0, 0, 3]), 4)
    np.testing.assert_array_equal(np.asarray(taken).ravel(), [1, 0, 3, 2, 4, 4, 4, 7])


def test_groups_that_do_not_divide_the_batch_are_refused():
    assert group_shape(64, 16) == (4, 16)
    assert group_shape(6, 16) == (1, 6)
    with pytest.raises(ValueError, match=r"batch of 24 .* groups of 16 \(objectives.group_size\)"):
        group_shape(24, 16)


def test_masks_depend_on_the_key_alone():
    again, other = arrays(draw(all_lengths(), PATCHES, jax.random.key(0), SPEC)), drawn(1)
    for name, first in vars(drawn()).items():
        np.testing.assert_array_equal(first, getattr(again, name), err_msg=name)
        if not name.endswith("_valid"):  # how many is not drawn
            assert (first != getattr(other, name)).any(), name


def test_everything_random_has_a_key_of_its_own(monkeypatch):
    """With one key for both, the patches that are kept would be those that are replaced."""
    keys = []

    def watched(draw):
        def drawn(key, *arguments, **options):
            jax.debug.callback(lambda key: keys.append(tuple(key.tolist())), jax.random.key_data(key))
            return draw(key, *arguments, **options)

        return drawn

    for name in ("uniform", "gumbel", "randint"):
        monkeypatch.setattr(jax.random, name, watched(getattr(jax.random, name)))
    spec = dataclasses.replace(SPEC, hard_negatives=0.5)

    @jax.jit
    def draw_all(key):
        draw_masks(all_lengths(), PATCHES, key, spec)

    draw_all(jax.random.key(0))
    jax.effects_barrier()
    assert len(set(keys)) == len(keys) == 9


def test_masks_of_one_objective_do_not_move_with_the_settings_of_another():
    """Each is drawn from a key of its own name."""
    moving = {
        ("drop_ratio", "language_ratio"): {"keep", "language_ids", "language_slots", "language_valid"},
        ("replace_ratio", "text_ratio"): {
            "replaced",
            "replaced_slots",
            "completion_ids",
            "completion_slots",
            "completion_valid",
        },
    }
    for options, names in moving.items():
        spec = dataclasses.replace(SPEC, **dict.fromkeys(options, 0.5))
        other = draw(all_lengths(), PATCHES, jax.random.key(0), spec)
        for name, first in vars(drawn()).items():
            same = np.array_equal(first, getattr(other, name))
            assert same == (name not in names), f"{options} and {name}"


def test_a_row_that_becomes_padding_moves_only_those_matched_with_it():
    batch, padded = all_lengths(), 5
    weight = batch.weight.at[padded].set(0.0)
    empty = jnp.full(L, -1)
    masks = draw(
        batch.replace(weight=weight, word_ids=batch.word_ids.at[padded].set(empty)), PATCHES, jax.random.key(0), SPEC
    )
    before, others = drawn(), np.arange(B) != padded
    for name in NAMES:
        was, now = getattr(before, name)[others], np.asarray(getattr(masks, name))[others]
        if name == "partner":
            was_padding = (before.partner == padded % 16) & (np.arange(B) // 16 == padded // 16)
            keep = ~was_padding[others]
            was, now = was[keep], now[keep]
        np.testing.assert_array_equal(was, now, err_msg=name)


def test_masks_do_not_depend_on_the_number_of_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    batch = jax.device_put(all_lengths(), NamedSharding(mesh, PartitionSpec("data")))
    masks = draw(batch, PATCHES, jax.random.key(0), SPEC)
    for name, first in vars(drawn()).items():
        np.testing.assert_array_equal(first, getattr(masks, name), err_msg=name)


def test_the_fused_pairs_are_those_of_the_active_objectives():
    assert pairs_needed(["contrastive"]) == ()
    assert pairs_needed(["masked_language", "matching"]) == ("matching", "language")
    assert pairs_needed(["global_vision"]) == pairs_needed(["global_text"]) == ("completion", "dropped")
    assert pairs_needed(PAIRS_OF) == ("matching", "language", "replaced", "completion", "dropped")  # METHOD section 4
