"""The network treats images, clips, masks, padding and layers as METHOD sections 1 to 3 say.

Axes: B batch, F frames, P patches, N tokens a frame, L text tokens, D width.
"""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_case import GOLDEN

from scl_jax.models import parameters
from scl_jax.models.fusion import FusionConfig, Pairing, Sizes, Wanted
from scl_jax.models.layers import gather_tokens
from scl_jax.models.mosaic_attention import mosaic_attention
from scl_jax.models.scl import SCL, SCLConfig
from scl_jax.models.text import TextConfig
from scl_jax.models.vision import ImageViews, VisionConfig, class_tokens_first, resize_positions

B, FRAMES, PATCHES, L, D, DEPTH = 2, 3, 16, 8, 16, 2
TOLERANCE = 1e-5
SIZES = {"width": D, "layers": DEPTH, "heads": 2, "mlp_width": 32}


def config_of(remat: str = "none", dropout: float = 0.0, attention: str = "xla") -> SCLConfig:
    shared = {**SIZES, "remat": remat, "attention": attention}
    rates = {"dropout": dropout, "attention_dropout": dropout}
    return SCLConfig(
        vision=VisionConfig(**shared, patch_size=8, image_size=32, max_frames=FRAMES),
        text=TextConfig(**shared, vocab_size=40, max_positions=20, **rates),
        fusion=FusionConfig(**shared, **rates),
        projection_width=8,
    )


@lru_cache
def params():
    """Weights of text and fusion ten times as large as at the start, so that all that they mix shows in the output."""
    state = jax.jit(lambda: parameters.split(SCL(config_of(), nnx.Rngs(0)))[1])()
    flat = parameters.flatten(state)
    scaled = {path: 10 * x if re.match("(text|fusion).*(kernel|embedding)$", path) else x for path, x in flat.items()}
    return parameters.unflatten(scaled)


@pytest.fixture(scope="module", autouse=True)
def made_before_any_trace():
    params()


def model(remat: str = "none", dropout: float = 0.0, weights=None, attention: str = "xla") -> SCL:
    graph, _ = parameters.abstract(lambda rngs: SCL(config_of(remat, dropout, attention), rngs))
    return parameters.merge(graph, params() if weights is None else weights)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def clip(seed: int = 0) -> jax.Array:
    return random(B, FRAMES, 32, 32, 3, seed=seed)


def text() -> tuple[jax.Array, jax.Array]:
    """(token_ids, token_mask): one text of eight tokens, one of five."""
    ids = jnp.asarray([[0, 9, 8, 7, 6, 5, 9, 2], [0, 7, 9, 5, 2, 1, 1, 1]])
    return ids, ids != 1


encode = jax.jit(lambda pixels, keep=None: model().vision(pixels, keep))
encode_text = jax.jit(lambda ids, mask: model().encode_text(ids, mask))


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


def test_more_padding_changes_no_text():
    ids, mask = text()
    longer = jnp.pad(ids, ((0, 0), (0, 3)), constant_values=1)
    wide = encode_text(longer, jnp.pad(mask, ((0, 0), (0, 3))))
    np.testing.assert_allclose(wide[:, :L], encode_text(ids, mask), atol=TOLERANCE)
    alone = encode_text(ids[1:, :5], mask[1:, :5])
    np.testing.assert_allclose(wide[1:, :5], alone, atol=TOLERANCE)


def test_padding_of_texts_changes_nothing_that_is_fused():
    """Also where the image stream attends to the text."""
    ids, mask = text()
    image = random(B, FRAMES + FRAMES * PATCHES, D)
    words = encode_text(ids, mask)
    fuse = jax.jit(lambda words, mask, image: dataclasses.astuple(model().fuse(words, mask, image, FRAMES)))
    fused_text, fused_image, _ = fuse(words, mask, image)
    garbage = jnp.where(mask[..., None], words, 100.0)
    other_text, other_image, _ = fuse(garbage, mask, image)
    np.testing.assert_allclose(other_image, fused_image, atol=TOLERANCE)
    np.testing.assert_allclose(other_text[mask], fused_text[mask], atol=TOLERANCE)
    short_text, short_image, _ = fuse(words[1:, :5], mask[1:, :5], image[1:])
    np.testing.assert_allclose(short_image, fused_image[1:], atol=TOLERANCE)
    np.testing.assert_allclose(short_text, fused_text[1:, :5], atol=TOLERANCE)


def test_the_joint_vector_is_the_pooled_text_then_the_pooled_mean_of_the_frames():
    ids, mask = text()
    network = model()
    fused = network.fuse(encode_text(ids, mask), mask, random(B, FRAMES + FRAMES * PATCHES, D), FRAMES)
    weights = jax.tree.map(np.asarray, params()["fusion"])
    globals_ = {"text_pooler": fused.text[:, 0], "image_pooler": np.asarray(fused.image[:, :FRAMES]).mean(axis=1)}
    expected = [np.tanh(np.asarray(x) @ weights[n]["kernel"] + weights[n]["bias"]) for n, x in globals_.items()]
    np.testing.assert_allclose(network.fusion.joint(fused), np.concatenate(expected, axis=1), atol=TOLERANCE)
    assert fused.patches.shape == (B, FRAMES, PATCHES, D)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_wanted_tokens_are_those_of_the_whole_last_layer(remat):
    ids, mask = text()
    words, image = encode_text(ids, mask), random(B, FRAMES + FRAMES * PATCHES, D)
    rng = np.random.default_rng(0)
    wanted = Wanted(*(jnp.asarray(rng.integers(0, n, (B, 3))) for n in (L, image.shape[1])))
    fuse = jax.jit(lambda wanted: dataclasses.astuple(model(remat).fuse(words, mask, image, FRAMES, wanted=wanted))[:2])
    for some, every, slots in zip(fuse(wanted), fuse(None), (wanted.text, wanted.image), strict=True):
        np.testing.assert_allclose(some, jnp.take_along_axis(every, slots[..., None], axis=1), atol=TOLERANCE)


@pytest.mark.parametrize(("remat", "depth"), [("none", 1), ("none", 2), ("full", 2), ("none", 3)])
def test_pairs_side_by_side_are_those_fused_row_by_row(remat, depth):
    """Images of two lengths; one is in no pair, one text in several; each pair is read at other tokens."""
    ids, mask = text()
    texts = [encode_text(ids, mask), encode_text(ids[::-1], mask[::-1])]
    masks = [mask, mask[::-1]]
    images = [random(B, n, D, seed=n) for n in (9, 9, 6)]
    texts_of, images_of = (0, 1, 1, 0), (1, 1, 2, 2)
    text_lengths, image_lengths = (tuple(x.shape[1] for x in xs) for xs in (texts, images))

    def segments(x, lengths, which):
        parts = jax.lax.split(x, lengths, axis=1)
        return jnp.concatenate([parts[i] for i in which], axis=1)

    pairing = Pairing(
        lambda x: segments(x, text_lengths, texts_of),
        lambda x: segments(x, image_lengths, images_of),
        Sizes(text_lengths, image_lengths),
        Sizes(tuple(text_lengths[i] for i in texts_of), tuple(image_lengths[i] for i in images_of)),
    )
    rng = np.random.default_rng(0)
    wanted = [
        Wanted(jnp.asarray(rng.integers(0, L, (B, s))), jnp.asarray(rng.integers(0, images[i].shape[1], (B, r))))
        for i, s, r in zip(images_of, (1, 3, 1, 2), (1, 1, 4, 4), strict=True)
    ]

    def shallow():
        network = model(remat)
        network.fusion.layers.depth = depth
        nnx.update(
            network.fusion.layers.each,
            jax.tree.map(lambda x: jnp.concatenate([x, x])[:depth], nnx.state(network.fusion.layers.each)),
        )
        return network

    def side_by_side():
        joined = (jnp.concatenate(x, axis=1) for x in (texts, masks, images))
        return [dataclasses.astuple(x)[:2] for x in shallow().fuse_pairs(*joined, FRAMES, pairing, wanted)]

    def row_by_row():
        network = shallow()
        for t, i, tokens in zip(texts_of, images_of, wanted, strict=True):
            whole = network.fuse(texts[t], masks[t], images[i], FRAMES)
            yield gather_tokens(whole.text, tokens.text), gather_tokens(whole.image, tokens.image)

    found, expected = jax.jit(side_by_side)(), jax.jit(lambda: list(row_by_row()))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=TOLERANCE), found, expected)


def test_attention_maps_are_the_cross_attention_of_the_last_text_layer():
    """Shares of the image (METHOD section 7), for an image of any token type."""
    ids, mask = text()
    image = random(B, 1 + PATCHES, D)

    def maps(words):
        return model().fusion.cross_attention_maps(words, mask, image, image_type=0)

    def expected(words):
        fusion = model().fusion
        graph, each = nnx.split(fusion.layers.each)
        first, last = (nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], each)) for i in range(DEPTH))
        x, y = first(*fusion.add_types(words, image, 0), mask, None)
        (query,) = last.text.cross_attention.query(last.text.attention(x, None, mask, None))
        key, _ = last.text.cross_attention.key_value(y)
        return jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / (D / 2) ** 0.5)

    found, by_hand = jax.jit(lambda words: (maps(words), expected(words)))(encode_text(ids, mask))
    assert found.shape == (B, 2, L, 1 + PATCHES)
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, atol=TOLERANCE)
    np.testing.assert_allclose(found, by_hand, atol=TOLERANCE)
    assert np.abs(by_hand - by_hand.mean(axis=-1, keepdims=True)).max() > 0.01


def everything(network: SCL, key=None):
    """A number that depends on all three encoders."""
    ids, mask = text()
    text_key, fuse_key = (None, None) if key is None else jax.random.split(key)
    fused = network.fuse(network.encode_text(ids, mask, text_key), mask, network.encode_image(clip()), FRAMES, fuse_key)
    return jnp.sum(network.fusion.joint(fused) ** 2)


@lru_cache
def with_remat(remat: str):
    ids, mask = text()
    graph, _ = parameters.abstract(lambda rngs: SCL(config_of(remat), rngs))

    def loss(p):
        return jnp.sum(parameters.merge(graph, p).text(ids, mask) ** 3)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params())
    return value, parameters.flatten(gradient["text"])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_number(remat):
    network = model(remat)
    assert {network.vision.blocks.remat, network.text.layers.remat, network.fusion.layers.remat} == {remat}
    (value, gradient), (expected, expected_gradient) = with_remat(remat), with_remat("none")
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for path, x in expected_gradient.items():
        np.testing.assert_allclose(gradient[path], x, atol=1e-5 * max(1.0, float(jnp.abs(x).max())), err_msg=path)


def test_attention_by_head_changes_no_number_of_the_whole_network(monkeypatch):
    monkeypatch.setattr("scl_jax.models.attention.WORTHWHILE", 1)

    def value_and_gradient(remat: str, attention: str):
        loss = partial(everything, key=jax.random.key(0))
        run = jax.value_and_grad(lambda p: loss(model(remat, 0.3, p, attention)))
        return jax.jit(run)(params())

    (value, gradient), (expected, expected_gradient) = (
        value_and_gradient(*way) for way in (("full", "by_head"), ("none", "xla"))
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(jnp.abs(y).max())))


def test_dropout_acts_only_with_a_key_and_repeats_with_it():
    run = jax.jit(lambda key: everything(model(dropout=0.3), key))
    silent = jax.jit(lambda: everything(model(dropout=0.3)))()
    np.testing.assert_allclose(silent, jax.jit(lambda: everything(model()))(), rtol=1e-6)
    one, again, two = (float(run(jax.random.key(seed))) for seed in (0, 0, 1))
    assert one == again
    assert len({one, two, float(silent)}) == 3


def test_weights_start_as_clips_and_berts_do():
    """Deviations by width and depth in the vision encoder, 0.02 elsewhere (ten times as large here)."""
    flat = parameters.flatten(params())
    deviations = {path: float(x.std()) for path, x in flat.items() if path.endswith(".kernel")}
    small = D**-0.5
    blocks = {"attention.qkv": small, "attention.out": small / 2, "mlp.up": (2 * D) ** -0.5, "mlp.down": small / 2}
    for name, expected in blocks.items():
        assert deviations.pop(f"vision.blocks.each.{name}.kernel") == pytest.approx(expected, rel=0.1), name
    assert deviations.pop("vision.patch_embedding.kernel") == pytest.approx(small, rel=0.1)
    for path, deviation in deviations.items():
        if flat[path].size > 200:
            expected = 0.2 if path.startswith(("text", "fusion")) else 0.02
            assert deviation == pytest.approx(expected, rel=0.25), path
    assert all(not x.any() for path, x in flat.items() if path.endswith(".bias"))


def test_layers_are_stacked_and_run_in_order():
    """Parameters of a stack lead with the layer axis, differ by layer, and layer i gets what layer i - 1 gave."""
    stacked = parameters.flatten(params()["text"]["layers"])
    assert {x.shape[0] for x in stacked.values()} == {DEPTH}
    kernel = stacked["each.attention.qkv.kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    ids, mask = text()
    layers, x = model().text.layers, model().text.embed(ids)
    graph, each = nnx.split(layers.each)
    expected = []
    for layer in range(DEPTH):
        expected.append(
            nnx.merge(graph, jax.tree.map(lambda p, i=layer: p[i], each))(expected[-1] if layer else x, mask)
        )
    last, outputs = layers(x, lambda layer, x, key: layer(x, mask, key=key), return_layers=True)
    np.testing.assert_allclose(outputs, jnp.stack(expected), atol=TOLERANCE)
    np.testing.assert_array_equal(last, outputs[-1])


def test_the_kernel_for_tpus_changes_no_number_of_the_whole_network(monkeypatch):
    """Run as ordinary operations, without dropout: its views go one by one, which splits dropout's key otherwise."""
    interpreted = partial(mosaic_attention, interpret=True)
    monkeypatch.setattr("scl_jax.models.attention.mosaic_attention", interpreted)

    def value_and_gradient(attention: str):
        return jax.jit(jax.value_and_grad(lambda p: everything(model("none", 0.0, p, attention))))(params())

    (value, gradient), (expected, expected_gradient) = (value_and_gradient(x) for x in ("mosaic", "xla"))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(jnp.abs(y).max())))
