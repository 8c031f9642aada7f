"""A batch taken in micro-batches gives the losses and the gradient of the same batch taken whole, in float64."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from scl_jax.tasks.task import Outputs, WholeBatch
from scl_jax.training.state import TrainState
from scl_jax.training.step import accumulated_gradient, make_step, whole_batch_gradient
from scl_jax.types import Batch, LossSum

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
    graph, _ = parameters.abstract(partial(SCL, sizes))
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


class OneNumber(nnx.Module):
    """A network whose only parameter is the temperature."""

    def __init__(self, rngs: nnx.Rngs):
        self.contrastive = nnx.Dict(temperature=nnx.Param(jnp.asarray(3.0)))


class Noise:
    """A task whose losses are quadratic in that number, times what dropout's key draws; it tells what keys draw."""

    group_size = 1

    def weights(self, step):
        return {"own": 1.0, "whole": 0.5}

    def draw_masks(self, batch, key):
        return jax.random.uniform(key, batch.weight.shape)

    def features(self, model, batch, masks, active, key):
        number, weight = model.contrastive.temperature[...], batch.weight.sum()
        noise = jnp.ones_like(batch.weight) if key is None else jax.random.uniform(key, batch.weight.shape)
        drawn = {"masks": LossSum(masks.sum(), weight), "dropout": LossSum(noise.sum(), weight)}
        own = LossSum(jnp.sum((number * noise) ** 2), weight)
        return Outputs({"own": own}, drawn, WholeBatch({"x": number * noise}, batch.weight, number))

    def whole_batch_losses(self, features):
        return {"whole": LossSum(jnp.sum(features.vectors["x"] ** 2), features.weight.sum())}

    def constrain(self, params):
        return params


def noisy_steps(seed: int, accumulate: int, **options) -> list[dict[str, float]]:
    """The metrics of two steps; the rate of a step is its number."""
    graph, params = parameters.split(OneNumber(nnx.Rngs(0)))
    tx, zeros = optax.sgd(0.0), jnp.zeros((4, 1), jnp.int32)
    batch = Batch(jnp.zeros((4, 1, 1, 1, 3)), zeros, zeros > 0, zeros, jnp.ones(4), zeros[:, 0])
    step = jax.jit(
        make_step(Noise(), graph, tx, lambda step: 1.0 * step, seed=seed, accumulate=accumulate, **options),
        static_argnums=2,
    )
    state, metrics = TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), None), []
    for _ in range(2):
        state, found = step(state, batch, ("own", "whole"))
        metrics.append({name: float(x) for name, x in found.items()})
    return metrics


def test_masks_and_dropout_are_drawn_anew_from_seed_and_step():
    metrics = noisy_steps(0, 1) + noisy_steps(1, 1)
    drawn = [found[f"accuracy/{name}"] for found in metrics for name in ("masks", "dropout")]
    assert len(set(drawn)) == 8
    assert noisy_steps(0, 1) == metrics[:2]
    assert [found["learning_rate"] for found in metrics[:2]] == [0.0, 1.0]
    still = noisy_steps(0, 1, dropout=False)
    assert [found["accuracy/dropout"] for found in still] == [1.0, 1.0]
    assert [found["accuracy/masks"] for found in still] == [found["accuracy/masks"] for found in metrics[:2]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_passes_over_a_micro_batch_drop_the_same(accumulate):
    """The gradient of what is quadratic in a number is twice itself by that number."""
    for found in noisy_steps(0, accumulate):
        assert found["gradient_norm"] == pytest.approx(2 * found["loss/total"] / 3.0, rel=1e-6)
