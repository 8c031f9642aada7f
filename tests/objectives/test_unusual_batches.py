"""Every objective has a finite loss and gradient on batches with nothing to mask, one sample, or one caption only."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from flax import nnx

from scl_jax import build
from scl_jax.benchmark.workload import random_arrays
from scl_jax.config import finalize
from scl_jax.models import parameters
from scl_jax.objectives.views import OBJECTIVES
from scl_jax.training.step import whole_batch_gradient
from scl_jax.types import Batch

VOCABULARY = 60
ROWS = 8  # two groups of four
BY_TEXT = ("masked_language", "local_text")  # have nothing to do where no word is masked


def config():
    return finalize(toy_run.config(Path()), VOCABULARY)


@pytest.fixture(scope="module")
def gradient_of():
    """A function: batch → (losses, accuracies, masks, gradient), all objectives."""
    task = build.pretraining(config(), VOCABULARY, mask_id=4)
    graph, params = parameters.split(build.model_maker(config())(nnx.Rngs(0)))
    weights = dict.fromkeys(OBJECTIVES, 1.0)

    @jax.jit
    def compute(batch):
        masks = task.draw_masks(batch, jax.random.key(1))
        gradient, outputs = whole_batch_gradient(task, graph, params, batch, masks, OBJECTIVES, weights, None)
        return outputs.losses, outputs.accuracies, masks, gradient

    return compute


def arrays(rows: int = ROWS) -> dict:
    return random_arrays(config(), "images", rows)


def without_words(made: dict, rows: slice) -> dict:
    """These texts are <s> </s> and padding."""
    made["token_ids"][rows, 2:] = 1
    made["token_mask"][rows] = np.arange(made["token_mask"].shape[1]) < 2
    made["word_ids"][rows] = -1
    return made


def one_caption(made: dict) -> dict:
    for name in ("token_ids", "token_mask", "word_ids"):
        made[name][:] = made[name][0]
    return made


def one_item(made: dict) -> dict:
    made["item_id"][:] = 5
    return made


def padded(made: dict, real: int) -> dict:
    made["weight"][real:] = 0
    return made


BATCHES = {
    "no words": lambda: without_words(arrays(), slice(None)),
    "one text without words": lambda: without_words(arrays(), slice(2, 3)),
    "one caption": lambda: one_caption(arrays()),
    "one item": lambda: one_item(arrays()),
    "one sample among padding": lambda: padded(arrays(), 1),
    "padding only": lambda: padded(arrays(), 0),
    "one sample": lambda: arrays(1),
}


@pytest.mark.parametrize("name", BATCHES)
def test_every_objective_is_finite(gradient_of, name):
    batch = Batch(**{field: jnp.asarray(x) for field, x in BATCHES[name]().items()})
    losses, accuracies, masks, gradient = gradient_of(batch)
    assert set(losses) == set(OBJECTIVES)
    for objective, loss in (losses | accuracies).items():
        assert np.isfinite(loss.mean()) and loss.mean() >= 0, objective
    for path, x in parameters.flatten(gradient).items():
        assert np.isfinite(x).all(), path
    if name == "no words":
        assert not masks.language_valid.any() and not masks.completion_valid.any()
        assert [float(losses[objective].weight) for objective in BY_TEXT] == [0, 0]
        assert [float(losses[objective].mean()) for objective in BY_TEXT] == [0, 0]
    if name in ("one caption", "one item", "one sample", "one sample among padding"):
        assert masks.is_pair[batch.weight > 0].all()  # nobody else's image is a false one: every sample keeps its own
    if name.startswith("one sample"):  # no negatives: the right answer is the only one
        for objective in ("contrastive", "global_vision", "global_text"):
            assert float(losses[objective].mean()) == pytest.approx(0, abs=1e-6), objective
    if name == "padding only":
        assert all(float(loss.weight) == float(loss.total) == 0 for loss in losses.values())
