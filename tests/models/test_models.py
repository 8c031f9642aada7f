"""The network treats texts, pairs, padding and layers as METHOD sections 1 to 3 say.

Axes: B batch, F frames, P patches, N tokens a frame, L text tokens, D width.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_network import (
    DEPTH,
    FRAMES,
    PATCHES,
    TOLERANCE,
    B,
    D,
    L,
    clip,
    config_of,
    encode_text,
    model,
    params,
    random,
    text,
)

from scl_jax.models import parameters
from scl_jax.models.fusion import Pairing, Sizes, Wanted
from scl_jax.models.layers import gather_tokens
from scl_jax.models.mosaic_attention import mosaic_attention
from scl_jax.models.scl import SCL


@pytest.fixture(scope="module", autouse=True)
def made_before_any_trace():
    params()


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
    graph, _ = parameters.abstract(partial(SCL, config_of(remat)))

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
