"""Retrieval fine-tuning: which texts an image is compared with, and that its loss depends on nothing else."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scl_jax.models import parameters
from scl_jax.models.fusion import FusionConfig
from scl_jax.models.scl import SCL, SCLConfig
from scl_jax.models.text import TextConfig
from scl_jax.models.vision import VisionConfig
from scl_jax.partition import on_mesh
from scl_jax.tasks.retrieval import Retrieval
from scl_jax.training import sharding
from scl_jax.training.step import accumulated_gradient, whole_batch_gradient
from scl_jax.types import Batch

ROWS, GROUP, LENGTH = 16, 8, 6
TASK = Retrieval(others=3, hard_negatives=1, group_size=GROUP)
SIZES = {"width": 8, "layers": 1, "heads": 2, "mlp_width": 16}


def make_batch(items=None, texts=None, weight=None) -> Batch:
    """Every item and every text differs, unless numbered otherwise."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 40, (ROWS, LENGTH))
    ids[:, 0] = 0
    ids[:, 1] = np.arange(ROWS) if texts is None else texts
    return Batch(
        pixels=jnp.asarray(rng.normal(size=(ROWS, 1, 32, 32, 3)), jnp.float32),
        token_ids=jnp.asarray(ids if texts is None else np.where(np.arange(LENGTH) > 1, 5, ids)),
        token_mask=jnp.ones((ROWS, LENGTH), bool),
        word_ids=jnp.zeros((ROWS, LENGTH), jnp.int32),
        weight=jnp.ones(ROWS) if weight is None else jnp.asarray(weight, jnp.float32),
        item_id=jnp.arange(ROWS) if items is None else jnp.asarray(items),
    )


def chosen(task: Retrieval, batch: Batch, seed: int, vectors=None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the batch whose texts each image is compared with, its own first, and which of them count."""
    rng = np.random.default_rng(1)
    text, image = vectors or (rng.normal(size=(ROWS, 4)), rng.normal(size=(ROWS, 4)))
    masks = task.draw_masks(batch, jax.random.key(seed))
    assert masks is not None
    places, valid = task.choose(masks, jnp.asarray(text), jnp.asarray(image), jnp.asarray(0.07))
    return np.asarray(places) + np.arange(ROWS)[:, None] // GROUP * GROUP, np.asarray(valid)


def test_other_texts_are_of_other_items_and_words_and_never_padding():
    items, texts = np.arange(ROWS) // 2, np.arange(ROWS) % 5
    weight = np.arange(ROWS) != 3
    for seed in range(10):
        rows, valid = chosen(TASK, make_batch(items, texts, weight), seed)
        np.testing.assert_array_equal(rows[:, 0], np.arange(ROWS))
        own = np.arange(ROWS)[:, None].repeat(3, axis=1)
        others, counts = rows[:, 1:], valid[:, 1:]
        assert valid[:, 0].all() and counts.any()
        assert (items[others] != items[own])[counts].all() and (texts[others] != texts[own])[counts].all()
        assert (others != 3)[counts].all()
        assert (others // GROUP == own // GROUP).all()
        assert all(len(set(row[count])) == count.sum() for row, count in zip(others, counts, strict=True))


def test_a_group_with_too_few_other_texts_gives_fewer():
    rows, valid = chosen(TASK, make_batch(items=np.where(np.arange(ROWS) % GROUP < 6, 100, np.arange(ROWS))), 0)
    del rows
    np.testing.assert_array_equal(valid[:, 1:].sum(axis=1)[:8], [2] * 6 + [3] * 2)


def test_hard_texts_are_the_most_similar_ones():
    image = np.random.default_rng(2).normal(size=(ROWS, 16))
    text = np.roll(image, 1, axis=0)  # the next row's text looks like this row's image
    hits = 0
    for seed in range(20):
        rows, _ = chosen(TASK, make_batch(), seed, (text, image))
        hits += (rows[:7, 1] == np.arange(1, 8)).sum()
    assert hits > 0.75 * 20 * 7
    even, _ = chosen(dataclasses.replace(TASK, hard_negatives=0), make_batch(), 0, (text, image))
    assert (even[:7, 1] == np.arange(1, 8)).mean() < 0.75


def test_the_contrastive_loss_counts_by_its_weight():
    assert TASK.active(0) == ("rank", "contrastive") and TASK.weights(0) == {"rank": 1.0, "contrastive": 0.5}
    alone = dataclasses.replace(TASK, contrastive_weight=0.0)
    assert alone.active(0) == ("rank",) and alone.weights(0) == {"rank": 1.0, "contrastive": 0.0}


def test_texts_that_do_not_count_are_not_compared(monkeypatch):
    """Of three others most rows have two here."""
    batch = make_batch(items=np.where(np.arange(ROWS) % GROUP < 6, 100, np.arange(ROWS)))
    vectors, scores = (jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, 4)), jnp.float32) for _ in range(2))
    keys: list = []
    network = SimpleNamespace(
        encode_image=lambda pixels: pixels,
        encode_text=lambda ids, mask, key: keys.append(key) or ids,
        project_image=lambda image, frames: vectors,
        project_text=lambda text: vectors,
        contrastive=SimpleNamespace(temperature=jnp.asarray(0.07)),
    )
    monkeypatch.setattr("scl_jax.tasks.retrieval.rank_scores", lambda *given: keys.append(given[-1]) or scores)

    @jax.jit
    def run():
        masks = TASK.draw_masks(batch, jax.random.key(0))
        _, valid = TASK.choose(masks, vectors, vectors, jnp.asarray(0.07))
        return TASK.features(network, batch, masks, ("rank",), jax.random.key(1)).losses["rank"], valid

    loss, valid = run()
    rows = zip(np.asarray(scores, float), np.asarray(valid), strict=True)
    expected = np.mean([np.log(np.exp(row[counts]).sum()) - row[0] for row, counts in rows])
    assert keys[0] is not keys[1]  # of dropout in the text encoder and in the fusion encoder
    assert not valid.all() and float(loss.mean()) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def model():
    sizes = SCLConfig(
        vision=VisionConfig(**SIZES, image_size=32, max_frames=1),
        text=TextConfig(**SIZES, vocab_size=40, max_positions=LENGTH + 2),
        fusion=FusionConfig(**SIZES),
        projection_width=4,
        heads=("contrastive", "rank"),
    )
    return parameters.split(SCL(sizes, nnx.Rngs(0)))


def gradient(model, batch, how, *more):
    graph, params = model
    masks = TASK.draw_masks(batch, jax.random.key(0))
    active, weights = TASK.active(0), TASK.weights(0)
    return how(TASK, graph, params, batch, masks, active, weights, None, *more)


def test_accumulation_gives_the_gradient_of_the_whole_batch(model):
    batch = make_batch()
    whole, outputs = jax.jit(lambda batch: gradient(model, batch, whole_batch_gradient))(batch)
    parts, again = jax.jit(lambda batch: gradient(model, batch, accumulated_gradient, 2))(batch)
    for name, loss in outputs.losses.items():
        assert float(again.losses[name].mean()) == pytest.approx(float(loss.mean()), rel=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max())), whole, parts)


def test_losses_do_not_depend_on_devices(model):
    batch = make_batch()

    def losses(batch):
        return {name: loss.mean() for name, loss in gradient(model, batch, whole_batch_gradient)[1].losses.items()}

    alone = jax.jit(losses)(batch)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    many = jax.jit(on_mesh(mesh, losses))(sharding.global_batch(batch, mesh))
    for name, value in alone.items():
        assert float(many[name]) == pytest.approx(float(value), rel=1e-5), name
