"""A batch taken in micro-batches gives the losses and the gradient of the same batch taken whole, in float64."""

import dataclasses
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
from scl_jax.models.layers import Precision
from scl_jax.models.scl import SCL
from scl_jax.objectives.views import OBJECTIVES
from scl_jax.training.step import accumulated_gradient, whole_batch_gradient
from scl_jax.types import Batch

ROWS = 16  # four groups of four
VOCABULARY = 60


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def both_ways(stream: str, active: tuple[str, ...], count: int, **changes):
    """(gradient, losses) of the whole batch and of `count` micro-batches, dropout off, two rows being padding."""
    config = finalize(toy_run.config(Path(), **changes), VOCABULARY)
    task = build.pretraining(config, config.model.text.vocab_size, mask_id=4)
    sizes = dataclasses.replace(build.model_config(config), precision=Precision(jnp.float64, jnp.float64))
    graph, _ = parameters.abstract(lambda rngs: SCL(sizes, rngs))
    params = jax.jit(lambda: parameters.split(SCL(sizes, nnx.Rngs(0)))[1])()
    arrays = random_arrays(config, stream, ROWS)
    arrays["weight"][[3, 9]] = 0
    batch = Batch(**{name: jnp.asarray(x) for name, x in arrays.items()})
    masks = jax.jit(task.draw_masks)(batch, jax.random.key(1))
    weights = {name: jnp.asarray(0.3 + 0.1 * place) for place, name in enumerate(OBJECTIVES)}

    def run(gradient_of, *more):
        def compute(params, batch, masks):
            return gradient_of(task, graph, params, batch, masks, active, weights, None, *more)

        gradient, outputs = jax.jit(compute)(params, batch, masks)
        means = {name: loss.mean() for name, loss in (outputs.losses | outputs.accuracies).items()}
        return parameters.flatten(gradient), means

    return run(whole_batch_gradient), run(accumulated_gradient, count)


def assert_equal(whole, parts) -> None:
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        scale = max(float(jnp.abs(value).max()), 1e-3)  # of this parameter; sums of different order differ by rounding
        np.testing.assert_allclose(parts[name], value, rtol=0, atol=1e-10 * scale, err_msg=name)


HARD = {"objectives.matching.hard_negatives": 1.0}
CASES = [
    pytest.param("images", OBJECTIVES, 2, HARD, id="all objectives, hard negatives"),
    pytest.param("images", ("contrastive",), 4, {}, id="contrastive alone", marks=pytest.mark.slow),
    pytest.param("videos", OBJECTIVES, 4, {}, id="all objectives on clips", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stream", "active", "count", "changes"), CASES)
def test_an_accumulated_batch_is_the_large_batch(stream, active, count, changes):
    (gradient, losses), (accumulated, sums) = both_ways(stream, active, count, **changes)
    assert set(active) <= losses.keys()
    assert_equal(losses, sums)
    assert_equal(gradient, accumulated)
    temperature = float(gradient["contrastive.temperature"])
    assert gradient["contrastive.temperature"].dtype == jnp.float64 and abs(temperature) > 1e-6
