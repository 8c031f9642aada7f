"""A loaded model gives the network's own numbers, whatever the batch, the padding and the kind of input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_model import ANSWERS, scenes

import scl_jax
from scl_jax import build
from scl_jax.convert.checkpoints import read_parameters
from scl_jax.data import images
from scl_jax.data.video import decode_frames
from scl_jax.inference import Model, media
from scl_jax.inference.network import batches
from scl_jax.inference.weights import read_weights
from scl_jax.models import parameters
from scl_jax.models.fusion import IMAGE_TYPE, SECOND_IMAGE_TYPE
from scl_jax.models.heads import unit

STILL, MOVING = scenes("images", 5), scenes("videos", 2)
PICTURES = [record["media"] for record in STILL]
TEXTS = ["a red star", "the big green heart is left of the small blue ring", "two shapes"]


@pytest.fixture(scope="module")
def network(tiny_run):
    """Runs a function of the training code's network with the checkpoint's parameters: network(f, *arrays)."""
    graph, _ = parameters.abstract(read_weights(str(tiny_run)).make)
    params = parameters.unflatten({path: jnp.asarray(x) for path, x in read_parameters(tiny_run)[0].items()})

    def run(function, *arrays):
        return np.asarray(jax.jit(lambda params, *xs: function(parameters.merge(graph, params), *xs))(params, *arrays))

    return run


def pixels_of(picture):
    return jnp.asarray(images.resize_square(images.load_rgb(images.open_image(picture)), 64)[None, None])


def tokens_of(model, text):
    tokens = model.tokenizer.encode(text, model.text_length)
    return jnp.asarray(tokens["token_ids"][None]), jnp.asarray(tokens["token_mask"][None])


def joint(net, ids, mask, pixels, image_type=IMAGE_TYPE):
    return net.fusion.joint(net.fuse(net.encode_text(ids, mask), mask, net.encode_image(pixels), 1, None, image_type))


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def test_features_are_those_of_the_training_code(tiny_model, network):
    def visual(net, pixels):
        return unit(net.project_image(net.encode_image(pixels), pixels.shape[1]))

    expected = network(visual, jnp.concatenate([pixels_of(picture) for picture in PICTURES]))
    np.testing.assert_allclose(tiny_model.encode_images(PICTURES), expected, atol=1e-6)
    frames = [Image.fromarray(frame) for frame in decode_frames(MOVING[0]["media"], 2)]
    expected = network(visual, jnp.asarray([[images.resize_square(frame, 64) for frame in frames]]))
    np.testing.assert_allclose(tiny_model.encode_videos(MOVING[0]["media"]), expected, atol=1e-6)
    tokens = [jnp.concatenate(parts) for parts in zip(*(tokens_of(tiny_model, text) for text in TEXTS), strict=True)]
    expected = network(lambda net, *tokens: unit(net.project_text(net.encode_text(*tokens))), *tokens)
    np.testing.assert_allclose(tiny_model.encode_texts(TEXTS), expected, atol=1e-6)


def test_features_are_unit_vectors(tiny_model):
    for features in (tiny_model.encode_images(PICTURES), tiny_model.encode_texts(TEXTS)):
        assert features.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-6)


def test_batch_size_and_padding_do_not_change_results(tiny_model, tiny_run):
    other = scl_jax.load(str(tiny_run), batch_sizes=(16,))
    np.testing.assert_allclose(other.encode_images(PICTURES), tiny_model.encode_images(PICTURES), atol=1e-5)
    np.testing.assert_allclose(other.encode_texts(TEXTS), tiny_model.encode_texts(TEXTS), atol=1e-5)
    alone = [tiny_model.match(picture, TEXTS[0]) for picture in PICTURES]
    np.testing.assert_allclose(other.match(PICTURES, TEXTS[0]), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [(1, 1)]),
        (7, [(7, 8)]),
        (9, [(8, 8), (1, 1)]),
        (20, [(8, 8), (8, 8), (4, 8)]),
        (33, [(33, 64)]),
        (64, [(64, 64)]),
        (74, [(64, 64), (8, 8), (2, 8)]),
    ],
)
def test_a_few_rows_more_than_a_batch_do_not_cost_as_much_as_a_large_one(rows, expected):
    assert list(batches(rows, (1, 8, 64))) == expected
    assert list(batches(rows, (64,))) == [(min(rows, 64), 64), *([(rows - 64, 64)] if rows > 64 else [])]


def test_a_rank_encodes_what_fits_a_batch_once(tiny_model, monkeypatch):
    decoded = []
    load_pixels = media.load_pixels
    monkeypatch.setattr(
        media, "load_pixels", lambda given, *sizes: decoded.append(len(given)) or load_pixels(given, *sizes)
    )
    found = tiny_model.rank(TEXTS[0], PICTURES)
    tiny_model.rank(PICTURES[0], TEXTS)
    assert decoded == [5, 1]
    twice = tiny_model.rank(TEXTS[0], PICTURES * 2)  # more than the largest batch, of 8: encoded again
    assert [one.score for one in twice[::2]] == pytest.approx([one.score for one in found], abs=1e-5)


def test_a_thousand_texts_of_mixed_length_compile_at_most_four_times(tiny_run):
    model = scl_jax.load(str(tiny_run))
    rng = np.random.default_rng(0)
    words = ["a", "the", "red", "green", "star", "ring", "left", "right", "of", "and", "small", "big", "above"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(1000)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are cut
        assert model.encode_texts(texts).shape == (1000, 16)
        for count in (1, 2, 7, 30):
            model.encode_texts(texts[:count])
    assert model.network.compilations()["texts"] <= 4


def test_paths_bytes_pil_images_and_arrays_are_the_same_picture(tiny_model, tmp_path):
    (tmp_path / "scene.jpg").write_bytes(PICTURES[0])
    image = Image.open(io.BytesIO(PICTURES[0]))
    kinds = [tmp_path / "scene.jpg", str(tmp_path / "scene.jpg"), PICTURES[0], image, np.asarray(image)]
    features = tiny_model.encode_images(kinds)
    np.testing.assert_array_equal(features, np.repeat(features[:1], len(kinds), axis=0))


def test_encode_media_takes_images_or_clips(tiny_model):
    np.testing.assert_array_equal(tiny_model.encode_media(PICTURES[:2]), tiny_model.encode_images(PICTURES[:2]))
    clip = MOVING[1]["media"]
    np.testing.assert_array_equal(tiny_model.encode_media(clip), tiny_model.encode_videos(clip))


def test_similarity_is_the_matrix_of_cosines(tiny_model):
    expected = tiny_model.encode_images(PICTURES) @ tiny_model.encode_texts(TEXTS).T
    np.testing.assert_allclose(tiny_model.similarity(PICTURES, TEXTS), expected, atol=1e-6)
    assert tiny_model.similarity(MOVING[0]["media"], "a red star").shape == (1, 1)


def test_match_is_the_probability_of_the_matching_head(tiny_model, network):
    pair = (*tokens_of(tiny_model, TEXTS[1]), pixels_of(PICTURES[1]))
    expected = softmax(network(lambda net, *pair: net.matching(joint(net, *pair))[0], *pair))[1]
    assert tiny_model.match(PICTURES[1], TEXTS[1]) == pytest.approx(float(expected), abs=1e-5)


def test_a_rank_head_orders_by_its_score_alone_and_tells_no_probability(tiny_model, network):
    tokens = tokens_of(tiny_model, TEXTS[1])
    scores = [network(lambda net, *x: net.rank(joint(net, *x))[0, 0], *tokens, pixels_of(one)) for one in PICTURES]
    found = tiny_model.rank(TEXTS[1], PICTURES)
    assert [one.index for one in found] == np.argsort(-np.asarray(scores)).tolist()
    assert [one.score for one in found] == pytest.approx(sorted(map(float, scores), reverse=True), abs=1e-5)
    assert {one.match for one in found} == {None}


def test_rank_orders_by_match_and_similarity_and_agrees_both_ways(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model, "heads", ("contrastive", "matching"))  # not fine-tuned for retrieval
    found = tiny_model.rank(TEXTS[1], PICTURES, 3)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    cosines = tiny_model.similarity(PICTURES, TEXTS[1])[:, 0]
    for one in found:
        assert one.similarity == pytest.approx(cosines[one.index], abs=1e-6)
        assert one.score == pytest.approx(np.log(one.match) + one.similarity / 0.07, abs=1e-4)
    back = tiny_model.rank(PICTURES[found[0].index], TEXTS, 3)
    assert next(one for one in back if one.index == 1).score == pytest.approx(found[0].score, abs=1e-4)


def test_rank_without_a_second_stage_is_the_order_of_cosines(tiny_model):
    cosines = tiny_model.similarity(PICTURES, TEXTS[0])[:, 0]
    found = tiny_model.rank(TEXTS[0], PICTURES, rerank=0)
    assert [one.index for one in found] == np.argsort(-cosines).tolist()
    assert found[0].match is None


def test_fill_mask_gives_the_likeliest_tokens_of_the_language_head(tiny_model, network):
    def logits_of(net, ids, mask, pixels):
        return net.masked_language(net.fuse(net.encode_text(ids, mask), mask, net.encode_image(pixels), 1).text)[0]

    text = "a <mask> star and a <mask>"
    ids, mask = tokens_of(tiny_model, text)
    logits = network(logits_of, ids, mask, pixels_of(PICTURES[0]))
    filled = tiny_model.fill_mask(text, PICTURES[0], k=3)
    for position, best in zip(np.flatnonzero(ids[0] == tiny_model.tokenizer.mask_id), filled, strict=True):
        chances = softmax(logits[position])
        order = [token for token in np.argsort(-chances) if token > 4][:3]  # the first five are special
        assert [chance for _, chance in best] == pytest.approx(chances[order].tolist(), rel=1e-4)
        assert [token for token, _ in best] == [tiny_model.tokenizer.decode([token]) for token in order]


def test_answer_entails_and_compare_use_their_heads(tiny_model, network, monkeypatch):
    def logits_of(net, ids, mask, first, second):
        one, other = joint(net, ids, mask, first), joint(net, ids, mask, second, SECOND_IMAGE_TYPE)
        pair = jnp.concatenate([one, other], axis=-1)
        return jnp.concatenate([net.vqa(one)[0], net.entailment(one)[0], net.nlvr2(pair)[0]])

    pair = (*tokens_of(tiny_model, TEXTS[1]), pixels_of(PICTURES[0]), pixels_of(PICTURES[1]))
    answers, entailment, truth = np.split(network(logits_of, *pair), [len(ANSWERS), len(ANSWERS) + 3])
    chances = 1 / (1 + np.exp(-answers))
    expected = (ANSWERS[int(chances.argmax())], pytest.approx(float(chances.max()), abs=1e-5))
    assert tiny_model.answer(PICTURES[0], TEXTS[1], k=2)[0] == expected
    found = list(tiny_model.entails(PICTURES[0], TEXTS[1]).values())
    assert found == pytest.approx(softmax(entailment).tolist(), abs=1e-5)
    found = tiny_model.compare(PICTURES[0], PICTURES[1], TEXTS[1])
    assert found == pytest.approx(float(softmax(truth)[1]), abs=1e-5)
    monkeypatch.setattr(tiny_model, "answers", ())  # no classes.json beside the checkpoint
    assert tiny_model.answer(PICTURES[0], TEXTS[1], k=1)[0][0] == f"answer {chances.argmax()}"


def test_attention_map_is_the_last_cross_attention_maximum_over_heads(tiny_model, network):
    def maps_of(net, ids, mask, pixels):
        return net.fusion.cross_attention_maps(net.encode_text(ids, mask), mask, net.encode_image(pixels))[0]

    ids, mask = tokens_of(tiny_model, TEXTS[1])
    weights = network(maps_of, ids, mask, pixels_of(PICTURES[0]))[:, :, 1:].max(axis=0)
    found = tiny_model.attention_map(PICTURES[0], TEXTS[1])
    np.testing.assert_allclose(found.overall[0], weights[0].reshape(4, 4), atol=1e-6)
    assert found.words == TEXTS[1].split()
    heart = [i for i, word in enumerate(tiny_model.tokenizer.encode(TEXTS[1], 16)["word_ids"]) if word == 3]
    np.testing.assert_allclose(found.per_word[3, 0], weights[heart].sum(axis=0).reshape(4, 4), atol=1e-6)
    start = TEXTS[1].index("big green heart")
    phrase = found.phrase(start, start + len("big green heart"))
    np.testing.assert_allclose(phrase, found.per_word[1:4].sum(axis=0), atol=1e-6)


def test_attention_to_a_clip_has_a_map_a_frame(tiny_model):
    found = tiny_model.attention_map(MOVING[0]["media"], "a red star")
    assert found.overall.shape == (2, 4, 4) and found.frames.shape == (2, 64, 64, 3)


def test_the_same_weights_in_other_files_give_the_same_features(tiny_model, tiny_run, tmp_path):
    from scl_jax.convert.to_torch import to_torch

    to_torch(tiny_run, tmp_path / "exported", say=lambda line: None)
    folder = scl_jax.load(str(tmp_path / "exported"), batch_sizes=(1, 8))
    assert (folder.text_length, folder.image_size, folder.video_frames) == (16, 64, 2)
    assert folder.answers == tiny_model.answers == ANSWERS
    np.testing.assert_allclose(folder.encode_images(PICTURES), tiny_model.encode_images(PICTURES), atol=1e-6)
    named = scl_jax.load(str(tmp_path / "exported" / "model.safetensors"), batch_sizes=(1, 8))  # the same by its file
    assert (named.text_length, named.image_size, named.video_frames) == (16, 64, 2)
    np.testing.assert_array_equal(named.encode_images(PICTURES), folder.encode_images(PICTURES))
    assert tiny_model.fingerprint == folder.fingerprint == named.fingerprint
    (tmp_path / "exported" / "config.json").write_text('{"model_type": "bert", "heads": 1}')  # of something else
    assert read_weights(str(tmp_path / "exported" / "model.safetensors")).attention_heads == (1, 1, 1)  # width / 64
    (tmp_path / "exported" / "config.json").unlink()
    file = read_weights(str(tmp_path / "exported" / "model.safetensors"), heads=2, vision_heads=2)
    assert file.heads == tiny_model.heads
    np.testing.assert_array_equal(file.flat["rank.kernel"], read_weights(str(tiny_run)).flat["rank.kernel"])


def test_activations_keep_their_type_from_encoder_to_fusion(tiny_run):
    model = scl_jax.load(str(tiny_run), dtype="bfloat16", batch_sizes=(1,))
    assert model.network("texts", *map(np.asarray, tokens_of(model, TEXTS[0])))[1].dtype == jnp.bfloat16
    assert model.encode_texts(TEXTS[0]).dtype == np.float32


def test_importing_the_package_does_not_import_jax():
    program = "import sys, scl_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_config_of_a_run_builds_the_network_that_training_built(tiny_run):
    from ml_collections import ConfigDict

    config = ConfigDict(json.loads((tiny_run / "config.json").read_text()))
    trained = parameters.flatten(parameters.abstract(build.model_maker(config))[1])
    loaded = parameters.flatten(parameters.abstract(read_weights(str(tiny_run)).make)[1])
    same = {path for path in trained if path != "fusion.token_type"}  # this checkpoint has the third row of NLVR2
    assert all(loaded[path].shape == trained[path].shape for path in same)


def test_every_method_that_users_call_is_tested_here():
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    methods = [name for name in vars(Model) if not name.startswith("_")]
    assert len(methods) >= 12
    assert [name for name in methods if f"model.{name}(" not in tests] == []
