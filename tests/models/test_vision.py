"""The network treats images and clips as METHOD sections 1 to 3 say.

Axes: B batch, F frames, P patches, N tokens a frame, L text tokens, D width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_case import GOLDEN
from small_network import (
    DEPTH,
    FRAMES,
    PATCHES,
    TOLERANCE,
    B,
    D,
    clip,
    encode,
    model,
    params,
    random,
)

from scl_jax.models import parameters
from scl_jax.models.vision import ImageViews, class_tokens_first, resize_positions


@pytest.fixture(scope="module", autouse=True)
def made_before_any_trace():
    params()


def test_a_clip_of_one_frame_is_an_image():
    """Ordinary self-attention over the [CLS] and the patches, temporal row 0 added."""
    out = encode(clip()[:, :1])
    assert out.shape == (B, 1 + PATCHES, D)
    vision = model().vision
    x = vision.norm_pre(vision.embed(clip()[:, :1]))
    for layer in range(DEPTH):
        block = block_of(layer)
        h = block.norm_1(x)[:, 0]
        query, key, value = block.attention.qkv(h)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (D / 2) ** 0.5
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value).reshape(h.shape)
        x = x + block.attention.out(mixed)[:, None]
        x = x + block.mlp(block.norm_2(x))
    np.testing.assert_allclose(out, vision.norm_post(x)[:, 0], atol=TOLERANCE)


def block_of(layer: int):
    """One block of the vision encoder, with its slice of the stacked parameters."""
    graph, stacked = nnx.split(model().vision.blocks.each)
    return nnx.merge(graph, jax.tree.map(lambda x: x[layer], stacked))


def test_a_still_clip_without_temporal_rows_looks_like_its_image():
    """Copies of one frame are each encoded as the image: attention over copies is attention over one."""
    flat = parameters.flatten(params())
    flat |= {"vision.temporal_embedding": jnp.zeros_like(flat["vision.temporal_embedding"])}
    vision = model(weights=parameters.unflatten(flat)).vision
    image = clip()[:, :1]
    still = vision(jnp.repeat(image, FRAMES, axis=1))
    single = vision(image)
    for frame in range(FRAMES):
        np.testing.assert_allclose(still[:, frame], single[:, 0], atol=TOLERANCE)
        patches = still[:, FRAMES + frame * PATCHES : FRAMES + (frame + 1) * PATCHES]
        np.testing.assert_allclose(patches, single[:, 1:], atol=TOLERANCE)


def test_every_frame_has_its_own_temporal_row_class_token_included():
    embedded = model().vision.embed(jnp.repeat(clip()[:, :1], FRAMES, axis=1))
    rows = params()["vision"]["temporal_embedding"]
    for frame in range(FRAMES):
        step = jnp.broadcast_to(rows[frame] - rows[0], embedded[:, 0].shape)
        np.testing.assert_allclose(embedded[:, frame] - embedded[:, 0], step, atol=TOLERANCE)


def test_the_class_tokens_of_all_frames_come_first():
    x = jnp.arange(2.0 * 3 * 5).reshape(2, 3, 5, 1)  # (B, F, N, D): token 0 of a frame is its [CLS]
    expected = [0, 5, 10, 1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14]
    np.testing.assert_array_equal(class_tokens_first(x)[0, :, 0], expected)


def test_more_frames_than_temporal_rows_are_an_error():
    with pytest.raises(ValueError, match=r"clip of 4 frames, .* 3 rows \(model.vision.max_frames\)"):
        model().vision(jnp.zeros((1, FRAMES + 1, 32, 32, 3)))


@pytest.mark.parametrize(("height", "width"), [(30, 30), (32, 40)], ids=["not patches", "not square"])
def test_pixels_of_an_unfit_shape_are_an_error(height, width):
    with pytest.raises(ValueError, match=f"{height}×{width}"):
        model().vision(jnp.zeros((1, 1, height, width, 3)))


def test_bytes_are_normalised_with_clips_mean_and_deviation():
    pixels = np.random.default_rng(0).integers(0, 256, (B, 1, 32, 32, 3), dtype=np.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # METHOD section 1
    normalised = jnp.asarray((pixels / 255 - mean) / std, jnp.float32)
    np.testing.assert_allclose(encode(jnp.asarray(pixels)), encode(normalised), atol=5e-5)


KEEP = np.array([[3, 0, 14], [7, 8, 2]])  # in any order, the same in every frame


def test_dropping_patches_is_encoding_only_the_kept_ones():
    """They keep their position rows, and nothing of the others is seen."""
    vision, rows = model().vision, np.arange(B)[:, None]
    embedded = vision.embed(clip())  # (B, F, 1 + P, D)
    kept = jnp.concatenate(
        [embedded[:, :, :1], jnp.stack([embedded[:, f][rows, 1 + KEEP] for f in range(FRAMES)], axis=1)], axis=2
    )
    x = vision.encode(kept.reshape(B, -1, kept.shape[-1]), [(1, FRAMES, 1 + KEEP.shape[1])])
    expected = class_tokens_first(x.reshape(kept.shape))
    np.testing.assert_allclose(encode(clip(), jnp.asarray(KEEP)), expected, atol=TOLERANCE)


@pytest.mark.parametrize(("frames", "joined"), [(1, True), (FRAMES, True), (1, False)])
def test_views_side_by_side_are_views_one_by_one(frames, joined):
    """Two of one shape and a shorter one, those of a sample next to each other: outputs and gradients."""
    pixels, others = clip()[:, :frames], clip(seed=1)[:, :frames]
    replaced = jnp.asarray(np.random.default_rng(2).random((B, PATCHES)) < 0.3)
    both = jnp.stack([pixels, others], axis=1).reshape(2 * B, *pixels.shape[1:])
    masks = jnp.stack([jnp.zeros_like(replaced), replaced], axis=1).reshape(2 * B, PATCHES)
    views = [ImageViews(both, replaced=masks, count=2), ImageViews(pixels, keep=jnp.asarray(KEEP))]

    def one_by_one(weights) -> list[jax.Array]:
        network = model(weights=weights)
        full, second = network.encode_image(pixels), network.encode_image(others, replaced=replaced)
        return [
            jnp.stack([full, second], axis=1).reshape(2 * B, *full.shape[1:]),
            network.encode_image(pixels, jnp.asarray(KEEP)),
        ]

    def all_at_once(weights) -> list[jax.Array]:
        network = model(weights=weights)
        network.vision.joins_views = joined
        return network.encode_images(views)

    def loss(encode, weights):
        outputs = encode(weights)
        return sum(jnp.sum(x * random(*x.shape, seed=3)) for x in outputs), outputs

    together = jax.jit(jax.grad(partial(loss, all_at_once), has_aux=True))
    apart = jax.jit(jax.grad(partial(loss, one_by_one), has_aux=True))
    for value, expected in zip(jax.tree.leaves(together(params())), jax.tree.leaves(apart(params())), strict=True):
        np.testing.assert_allclose(value, expected, atol=TOLERANCE * max(1.0, float(jnp.abs(expected).max())))


def test_what_is_dropped_is_not_seen():
    pixels = np.array(clip()).reshape(B, FRAMES, 4, 8, 4, 8, 3)
    for row in range(B):
        for patch in set(range(PATCHES)) - set(KEEP[row]):
            pixels[row, :, patch // 4, :, patch % 4] = 9.0
    other = jnp.asarray(pixels.reshape(B, FRAMES, 32, 32, 3))
    np.testing.assert_array_equal(encode(clip(), jnp.asarray(KEEP)), encode(other, jnp.asarray(KEEP)))


def test_the_mask_vector_replaces_patches_before_positions_are_added():
    replaced = np.zeros((B, PATCHES), bool)
    replaced[0, [1, 5]] = replaced[1, [0, 15]] = True
    vision, weights = model().vision, params()["vision"]
    clean, masked = vision.embed(clip()), vision.embed(clip(), replaced=jnp.asarray(replaced))
    for row, patch in zip(*np.nonzero(replaced), strict=True):
        for frame in range(FRAMES):
            expected = (
                weights["mask_embedding"]
                + weights["position_embedding"][1 + patch]
                + weights["temporal_embedding"][frame]
            )
            np.testing.assert_allclose(masked[row, frame, 1 + patch], expected, atol=TOLERANCE)
    untouched = ~np.pad(replaced, ((0, 0), (1, 0)))
    for frame in range(FRAMES):
        np.testing.assert_array_equal(masked[:, frame][untouched], clean[:, frame][untouched])


@pytest.mark.parametrize("token", [4, 0], ids=["a patch of frame 1", "its [CLS]"])
def test_in_one_block_patches_see_their_frame_and_class_tokens_all_frames(token):
    x = random(1, FRAMES, 1 + PATCHES, D)
    changed = x.at[:, 1, token].set(random(D, seed=1))
    shapes = [(1, *x.shape[1:3])]
    block = jax.jit(lambda x: block_of(0)(x.reshape(1, -1, D), shapes).reshape(x.shape))
    moved = np.abs(np.asarray(block(changed) - block(x))).max(axis=-1)[0]  # (F, N)
    assert (moved[:, 0] > 0).all(), "the [CLS] of every frame sees it"
    assert (moved[1] > 0).all(), "its own frame sees it"
    assert not moved[[0, 2], 1:].any(), "patches of other frames do not"


@pytest.mark.parity
def test_position_tables_are_resized_as_the_reference_does():
    """Bicubic with a = -0.75 and no antialiasing; 2e-5 by the golden README."""
    arrays = np.load(GOLDEN / "tiny_interp.npz")
    cases = sorted({name.split("/")[0] for name in arrays.files})
    assert len(cases) >= 6
    for name in cases:
        before, after = arrays[f"{name}/before"], arrays[f"{name}/after"]
        resized = resize_positions(jnp.asarray(before), round((len(after) - 1) ** 0.5))
        np.testing.assert_allclose(resized, after, atol=2e-5, err_msg=name)
        np.testing.assert_array_equal(resized[0], before[0])


def test_an_image_of_another_resolution_is_encoded():
    assert encode(random(1, 1, 48, 48, 3)).shape == (1, 1 + 36, D)
