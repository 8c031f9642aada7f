"""Retrieval by a whole model gives what its network says of every text with every item, pair by pair."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.evaluation.retrieval import RetrievalEvaluation, pair_scores
from scl_jax.models import parameters
from scl_jax.models.fusion import FusionConfig
from scl_jax.models.heads import unit
from scl_jax.models.scl import SCL, SCLConfig
from scl_jax.models.text import TextConfig
from scl_jax.models.vision import VisionConfig
from scl_jax.training.sharding import make_mesh

ITEMS, TEXTS, FRAMES, LENGTH, BATCH = 3, 5, 2, 6, 2
SIZES = {"width": 8, "layers": 1, "heads": 2, "mlp_width": 16}


class Examples:
    """Clips and texts in batches of two, the last one padded."""

    num_items, num_captions = ITEMS, TEXTS
    caption_item = np.array([2, 0, 1, 1, 0])

    def __init__(self):
        rng = np.random.default_rng(0)
        self.pixels = rng.normal(size=(ITEMS, FRAMES, 16, 16, 3)).astype(np.float32)
        self.token_ids = rng.integers(5, 40, (TEXTS, LENGTH)).astype(np.int32)
        self.token_mask = np.arange(LENGTH) < rng.integers(3, LENGTH + 1, TEXTS)[:, None]
        self.token_ids[~self.token_mask] = 1

    def batches(self, count, **fields):
        for first in range(0, count, BATCH):
            rows = np.minimum(np.arange(first, first + BATCH), count - 1)
            yield {name: values[rows] for name, values in fields.items()}

    def items(self):
        return self.batches(ITEMS, pixels=self.pixels)

    def texts(self):
        return self.batches(TEXTS, token_ids=self.token_ids, token_mask=self.token_mask)


@pytest.fixture
def network():
    sizes = SCLConfig(
        vision=VisionConfig(**SIZES, patch_size=8, image_size=16, max_frames=FRAMES),
        text=TextConfig(**SIZES, vocab_size=40, max_positions=LENGTH + 2),
        fusion=FusionConfig(**SIZES),
        projection_width=4,
        heads=("contrastive", "matching"),
    )
    graph, shapes = parameters.abstract(partial(SCL, sizes))
    rng = np.random.default_rng(1)  # large enough that inputs matter
    flat = {path: rng.normal(0, 0.3, x.shape) for path, x in parameters.flatten(shapes).items()}
    flat |= {path: 1 + x for path, x in flat.items() if path.endswith(".scale")} | {"contrastive.temperature": 0.5}
    return graph, parameters.unflatten({path: jnp.asarray(x, jnp.float32) for path, x in flat.items()})


def pair_by_pair(graph, params, examples) -> jax.Array:
    """(texts, items): log P(pair) by the matching head, and cosines over the temperature."""
    model = parameters.merge(graph, params)
    ids, mask = jnp.asarray(examples.token_ids), jnp.asarray(examples.token_mask)
    image, text = model.encode_image(jnp.asarray(examples.pixels)), model.encode_text(ids, mask)
    cosines = unit(model.project_text(text)) @ unit(model.project_image(image, FRAMES)).T
    rows, columns = np.divmod(np.arange(TEXTS * ITEMS), ITEMS)
    joint = model.fusion.joint(model.fuse(text[rows], mask[rows], image[columns], FRAMES))
    log_pair = jax.nn.log_softmax(model.matching(joint))[:, 1]
    return log_pair.reshape(TEXTS, ITEMS) + cosines / 0.5


def test_scores_are_those_of_single_pairs(network):
    graph, params = network
    examples = Examples()
    expected = jax.jit(lambda params: pair_by_pair(graph, params, examples))(params)
    mesh = make_mesh(devices=jax.devices()[:1])
    options = {"head": "matching", "batch_size": 4, "rerank": 0, "all_pairs": True}
    evaluation = RetrievalEvaluation(graph, mesh, {"videos": examples}, **options)
    metrics, rankings = evaluation(params)
    for top, scores in ((rankings["videos"].text_to_item, expected), (rankings["videos"].item_to_text, expected.T)):
        np.testing.assert_array_equal(top.ids, np.argsort(-scores))
        np.testing.assert_allclose(top.scores, -np.sort(-scores), atol=1e-4)
    right = np.argmax(expected, axis=1) == examples.caption_item
    assert metrics["retrieval/video/text_to_video/recall@1"] == pytest.approx(right.mean())
    assert np.ptp(expected) > 0.1


def test_a_pair_scores_what_its_head_says():
    heads = SimpleNamespace(matching=lambda joint: 2 * joint, rank=lambda joint: joint[:, 1:])
    joint = jnp.asarray([[1.0, 4.0], [3.0, 2.0]])
    np.testing.assert_array_equal(pair_scores(heads, "matching", joint), [6.0, -2.0])
    np.testing.assert_array_equal(pair_scores(heads, "rank", joint), [4.0, 2.0])


def evaluation_of(sets, head="matching", **options) -> RetrievalEvaluation:
    mesh = make_mesh(devices=jax.devices()[:1])
    return RetrievalEvaluation(None, mesh, sets, head=head, batch_size=4, rerank=7, **options)


@pytest.mark.parametrize(("head", "combine"), [("matching", "sum"), ("rank", "matching")])
def test_similarity_counts_beside_the_matching_head_alone(monkeypatch, head, combine):
    told = {}
    monkeypatch.setattr("scl_jax.evaluation.retrieval.rank", lambda *_, **options: told.update(options))
    monkeypatch.setattr(RetrievalEvaluation, "_gallery", lambda *_: (None, None))
    monkeypatch.setattr(RetrievalEvaluation, "_pair_scorer", lambda *_: None)
    evaluation = evaluation_of({"images": Examples()}, head, weights=(0.5, 2.0))
    evaluation.retrieval({"contrastive": {"temperature": 0.25}}, "images", Examples())
    assert told["combine"] == combine and told["temperature"] == 0.25
    assert told["rerank"] == 7 and told["weights"] == (0.5, 2.0) and told["item"] == "image"


def test_a_weight_that_is_chosen_on_held_out_sets_is_taken_by_stream():
    chosen = {"images": {"retrieval/matching_weight": 0.25}, "videos": {"retrieval/video/matching_weight": 0.5}}
    held_out = SimpleNamespace(
        sets=dict.fromkeys(chosen), retrieval=lambda params, stream, _: SimpleNamespace(metrics=chosen[stream])
    )
    evaluation = evaluation_of(dict.fromkeys(chosen), weights=(0.0, 1.0))
    evaluation.fix_weights({}, held_out)
    assert evaluation._weights == {"images": (0.25,), "videos": (0.5,)}
