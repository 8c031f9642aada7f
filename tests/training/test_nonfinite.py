"""A step that is not finite changes nothing but the count of steps, is counted, and is kept to be looked at."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from scl_jax.models import parameters
from scl_jax.tasks.task import Outputs, WholeBatch, bounded_temperature
from scl_jax.training.loop import Window
from scl_jax.training.nonfinite import KEPT, SKIPPED, Dispatched, Guard, NonFiniteError, records
from scl_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from scl_jax.training.state import TrainState
from scl_jax.training.step import make_step
from scl_jax.types import LossSum

STEPS = 6


class OneNumber(nnx.Module):
    """A network whose only parameter is the temperature."""

    def __init__(self, rngs: nnx.Rngs):
        self.contrastive = nnx.Dict(temperature=nnx.Param(jnp.asarray(1.0)))


class Product:
    """A task whose loss is the number times that of the batch; -1 has a finite loss and an infinite gradient."""

    def weights(self, step):
        return {"product": 1.0}

    def draw_masks(self, batch, key):
        return None

    def features(self, model, batch, masks, active, key):
        number, factor = model.contrastive.temperature[...], batch.pixels
        root = jnp.sqrt(jnp.where(factor == -1, number - jax.lax.stop_gradient(number), 1.0)) - (factor != -1)
        return Outputs({"product": LossSum(number * factor + root, jnp.ones([]))}, {}, WholeBatch({}, batch, number))

    def whole_batch_losses(self, features):
        return {}

    def constrain(self, params):
        return bounded_temperature(params, (0.01, 1.0))


LINEAR = OptimizerConfig(learning_rate=0.01, decay="linear")


def run(factors: list[float], options: OptimizerConfig = LINEAR):
    """(states, metrics) of steps whose batches are these numbers."""
    graph, params = parameters.split(OneNumber(nnx.Rngs(0)))
    tx = make_optimizer(options, STEPS, params)
    task, schedule = Product(), make_schedule(options, STEPS)
    step = jax.jit(make_step(task, graph, tx, schedule, seed=0, dropout=False, ema=0.5), static_argnums=2)
    states, metrics = [TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), params)], []
    for factor in factors:
        state, found = step(states[-1], SimpleBatch(jnp.asarray(factor)), ())
        states.append(state)
        metrics.append(found)
    return states, metrics


@jax.tree_util.register_pytree_node_class
class SimpleBatch(SimpleNamespace):
    def __init__(self, pixels):
        super().__init__(pixels=pixels)

    def tree_flatten(self):
        return (self.pixels,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0], ids=str)
def test_a_step_that_is_not_finite_changes_nothing_to_the_bit(bad):
    states, metrics = run([0.5, bad, 0.5])
    before, after = states[1], states[2]
    assert [float(found[SKIPPED]) for found in metrics] == [0, 1, 0]
    assert bool(jnp.isfinite(metrics[1]["loss/total"])) == (bad == -1.0)  # of which only the gradient is not
    for name in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    (adam, schedule), (adam_after, schedule_after) = (
        [leaf for leaf in jax.tree.leaves(state.opt_state, is_leaf=is_adam_or_rate) if is_adam_or_rate(leaf)]
        for state in (before, after)
    )
    jax.tree.map(np.testing.assert_array_equal, adam, adam_after)
    assert int(schedule_after.count) == int(schedule.count) + 1  # learning rates belong to steps
    assert int(after.step) == int(before.step) + 1


def is_adam_or_rate(x) -> bool:
    return isinstance(x, optax.ScaleByAdamState | optax.ScaleByScheduleState)


def test_after_a_skipped_step_the_update_is_that_of_a_run_without_it():
    """Same moments, same parameters, at the learning rate of the later step."""
    constant = OptimizerConfig(learning_rate=0.01, decay="constant", warmup=0)
    skipped, _ = run([0.5, math.nan, 0.25], constant)
    without, _ = run([0.5, 0.25], constant)
    jax.tree.map(np.testing.assert_array_equal, skipped[3].params, without[2].params)


def test_the_temperature_is_kept_in_its_range_and_so_is_its_average():
    """It starts at 1, the upper bound, and every gradient would raise it."""
    states, metrics = run([-2.0] * 3)
    assert [float(state.params["contrastive"]["temperature"]) for state in states] == [1.0] * 4
    assert float(states[-1].ema["contrastive"]["temperature"]) == 1.0 and float(metrics[-1]["learning_rate"]) > 0


def test_the_learning_rate_that_is_logged_is_the_one_of_the_update():
    _, metrics = run([0.5, math.nan, 0.5, 0.5])
    expected = make_schedule(LINEAR, STEPS)
    assert [float(found["learning_rate"]) for found in metrics] == [float(expected(step)) for step in range(4)]


def of_step(loss: float, skipped: float, gradient: float = 1.0) -> dict:
    numbers = {"loss/matching": loss, "loss/contrastive": 0.5, "loss/total": loss + 0.5, "gradient_norm": gradient}
    return {name: jnp.asarray(value) for name, value in (numbers | {SKIPPED: skipped}).items()}


def test_a_window_counts_skipped_updates_and_averages_the_others():
    window = Window()
    for loss, skipped in ((1.0, 0.0), (math.nan, 1.0), (3.0, 0.0), (math.nan, 1.0)):
        window.add("images", of_step(loss, skipped))
    again = Window(json.loads(json.dumps(window.state())))  # by way of a checkpoint
    again.add("images", of_step(5.0, 0.0))
    means = again.means()
    assert means[SKIPPED] == 2 and means["loss/images/matching"] == 3.0
    again.add("images", of_step(math.nan, 1.0))
    assert again.means() == {SKIPPED: 1}


def dispatched(step: int, **metrics) -> Dispatched:
    return Dispatched(step, "images", {"next_index": step - 1}, jnp.arange(4), of_step(**metrics))


def test_a_guard_keeps_what_a_replay_needs_and_stops_after_a_row(tmp_path):
    said, kept = [], []
    guard = Guard(tmp_path / "nonfinite", 3, 7, said.append, on_skip=kept.append)
    for step, bad in enumerate((0, 1, 1, 0, 1, 1), start=1):
        guard.add(dispatched(step, loss=math.nan if bad else 1.0, skipped=bad))
        guard.settle(leave=1)
    guard.settle()
    assert guard.in_row == 2 and kept == records(tmp_path / "nonfinite") == [2, 3, 5, 6]
    record = json.loads((tmp_path / "nonfinite/step_5.json").read_text())
    assert record == {
        "step": 5,
        "seed": 7,
        "stream": "images",
        "item_id": [0, 1, 2, 3],
        "losses": {"matching": "nan", "contrastive": 0.5, "total": "nan"},
        "gradient_norm": 1.0,
        "data": {"next_index": 4},
    }
    assert said[0].startswith("step 2: the loss of matching is not finite; the update is skipped, its batch kept in ")
    guard.add(dispatched(7, loss=math.nan, skipped=1.0))
    with pytest.raises(NonFiniteError, match=r"3 updates in a row, up to step 7, .* the loss of matching is not") as e:
        guard.settle()
    assert e.value.objectives == ("matching",)


def test_a_guard_says_when_only_the_gradient_is_not_finite(tmp_path):
    guard = Guard(tmp_path, 1, 0)
    guard.add(dispatched(4, loss=1.0, skipped=1.0, gradient=math.inf))
    with pytest.raises(NonFiniteError, match="the gradient, though every loss is finite, is not finite") as error:
        guard.settle()
    assert error.value.objectives == () and error.value.record["gradient_norm"] == "inf"


def test_a_row_goes_on_after_a_restart(tmp_path):
    guard = Guard(tmp_path, 3, 0, in_row=2)
    guard.add(dispatched(9, loss=math.nan, skipped=1.0))
    with pytest.raises(NonFiniteError, match="3 updates in a row"):
        guard.settle()


def test_records_are_bounded(tmp_path):
    said: list[str] = []
    guard = Guard(tmp_path, 10 * KEPT, 0, said.append)
    for step in range(1, KEPT + 20):
        guard.add(dispatched(step, loss=math.nan, skipped=1.0))
    guard.settle()
    assert len(records(tmp_path)) == KEPT and len(said) == KEPT + 1 and guard.in_row == KEPT + 19
