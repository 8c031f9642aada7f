"""Rows of a gallery are the same wherever they lie, and pairs are scored the same from there."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import toy_run

from scl_jax import build
from scl_jax.benchmark.retrieval import RandomSet
from scl_jax.benchmark.workload import complete
from scl_jax.evaluation import gallery
from scl_jax.evaluation.gallery import IN_FLIGHT, Rows, joining, queued
from scl_jax.evaluation.pretraining import PretrainingEvaluation
from scl_jax.training.sharding import make_mesh, split_rows
from scl_jax.training.state import init_state


@pytest.mark.parametrize("budget", [None, 0])
def test_rows_are_joined_without_padding_on_the_device_or_on_the_host(budget):
    mesh = make_mesh()
    columns = np.arange(24 * 3, dtype=np.float32).reshape(24, 3), np.arange(24)
    parts = [split_rows(tuple(x[start : start + 8] for x in columns), mesh) for start in (0, 8, 16)]
    rows = Rows(parts, 21, mesh, budget)
    assert rows.on_device == (budget is None)
    for ours, expected in zip(rows.on_host(), columns, strict=True):
        np.testing.assert_array_equal(ours, expected[:21])
    if rows.on_device:
        assert all(x.is_fully_replicated for x in rows.arrays)


def test_what_a_device_cannot_take_is_moved_to_the_host_as_it_comes():
    """Not when the last part is there, which might never be."""
    mesh, made, alive = make_mesh(), [], []
    columns = np.arange(40 * 3, dtype=np.float32).reshape(40, 3)

    def parts():
        for start in range(0, 40, 8):
            alive.append(sum(part() is not None for part in made))
            (part,) = split_rows((columns[start : start + 8],), mesh)
            made.append(weakref.ref(part))
            yield (part,)
            del part

    rows = Rows(parts(), 37, mesh, budget=columns[:16].nbytes)
    assert alive == [0, 1, 2, 1, 1]  # the third was too much; the one that was moved last is still held
    assert not rows.on_device
    np.testing.assert_array_equal(rows.arrays[0], columns[:37])


def test_at_most_so_many_batches_are_under_way():
    waited = []

    def run(batch: int):
        assert len(waited) >= batch - IN_FLIGHT
        return Awaited(batch)

    class Awaited:
        def __init__(self, batch: int):
            self.batch = batch

        def block_until_ready(self):
            waited.append(self.batch)
            return self

    assert [result.batch for result in queued(range(6), run)] == list(range(6))
    assert waited == list(range(6 - IN_FLIGHT))


def test_a_gallery_that_does_not_fit_the_device_is_ranked_the_same(monkeypatch):
    config = toy_run.config(Path("."))
    config.model.text.vocab_size = 60
    config = complete(config, "images", 8)
    task = build.pretraining(config, 60, mask_id=4)
    mesh = make_mesh()
    graph, _, state = init_state(build.model_maker(config), build.optimizer_maker(config), mesh, 0)
    examples = RandomSet(config, "images", 11, 8)
    evaluation = PretrainingEvaluation(graph, task, mesh, {"images": examples}, batch_size=8, rerank=3, seed=0)
    here = evaluation.retrieval(state.params, "images", examples)
    monkeypatch.setattr(gallery, "free_bytes", lambda mesh: 0)
    there = evaluation.retrieval(state.params, "images", examples)
    assert here.metrics == there.metrics
    np.testing.assert_array_equal(here.text_to_item.scores, there.text_to_item.scores)


def test_a_second_gallery_compiles_nothing():
    mesh = make_mesh()
    parts = [split_rows((np.zeros((8, 5), np.float32),), mesh)] * 2
    Rows(parts, 15, mesh)
    compiled = joining(mesh)._cache_size()
    Rows(parts, 15, mesh)
    assert joining(mesh)._cache_size() == compiled
