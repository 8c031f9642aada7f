"""One training step: masks, forward, backward, update, as one jitted function on a donated state.

Gradient accumulation is exact: masks are drawn for the whole batch, means are taken over the whole batch, and the
losses that compare the whole batch see all of it. A first pass over the micro-batches collects the compared vectors,
the gradient of the losses by these vectors is taken once, and a second pass carries it into the network.

A step whose loss or gradient is not finite leaves parameters and optimizer as they are (training/nonfinite.py).

Axes: B batch, A micro-batches, G samples of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from scl_jax.models import parameters
from scl_jax.models.parameters import Params
from scl_jax.tasks.task import Outputs, Task, WholeBatch
from scl_jax.training.nonfinite import SKIPPED, keep_where_finite
from scl_jax.training.optimizer import global_norm
from scl_jax.training.state import TrainState
from scl_jax.types import Batch, LossSum

Metrics = dict[str, Float[Array, ""]]


def split_micro_batches(tree: Any, count: int, group_size: int) -> Any:
    """Every leaf (B, …) → (A, B/A, …). A micro-batch takes every A-th group, so that groups stay where they are."""

    def split(x: Array) -> Array:
        groups = x.shape[0] // group_size
        x = x.reshape(groups // count, count, group_size, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(count, -1, *x.shape[3:])

    return jax.tree.map(split, tree)


def weighted_total(losses: dict[str, LossSum], weights: dict[str, Any]) -> Float[Array, ""]:
    """Σ weight · mean."""
    return sum((weights[name] * loss.mean() for name, loss in losses.items()), jnp.zeros([]))


def total_loss(
    task: Task, graph: nnx.GraphDef, params: Params, batch: Batch, masks, active, weights, key
) -> tuple[Float[Array, ""], Outputs]:
    """The total loss by one pass over the batch, and all losses; `key` switches dropout on."""
    outputs = task.features(parameters.merge(graph, params), batch, masks, active, key)
    losses = outputs.losses | task.whole_batch_losses(outputs.whole_batch)
    return weighted_total(losses, weights), dataclasses.replace(outputs, losses=losses)


def whole_batch_gradient(
    task: Task, graph: nnx.GraphDef, params: Params, batch: Batch, masks, active, weights, key
) -> tuple[Params, Outputs]:
    """Gradient of the total loss by one pass over the batch."""

    def total(params: Params) -> tuple[Float[Array, ""], Outputs]:
        return total_loss(task, graph, params, batch, masks, active, weights, key)

    return jax.grad(total, has_aux=True)(params)


def accumulated_gradient(
    task: Task, graph: nnx.GraphDef, params: Params, batch: Batch, masks, active, weights, key, count: int
) -> tuple[Params, Outputs]:
    """The same gradient by two passes over `count` micro-batches, in the memory of one of them."""
    group = min(task.group_size, batch.weight.shape[0])
    micro_batches = split_micro_batches((batch, masks), count, group)
    keys = None if key is None else jax.random.split(key, count)

    def run(params, xs) -> Outputs:
        (micro_batch, micro_masks), micro_key = xs
        return task.features(parameters.merge(graph, params), micro_batch, micro_masks, active, micro_key)

    _, first = jax.lax.scan(lambda _, xs: (None, run(params, xs)), None, (micro_batches, keys))
    sums = jax.tree.map(lambda x: x.sum(axis=0), (first.losses, first.accuracies))

    stacked = first.whole_batch  # (A, B/A, …)
    temperature = stacked.temperature[0]

    def compare(vectors, temperature):
        flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in vectors.items()}
        losses = task.whole_batch_losses(WholeBatch(flat, stacked.weight.reshape(-1), temperature))
        return weighted_total(losses, weights), losses

    cotangents, compared = jax.grad(compare, argnums=(0, 1), has_aux=True)(stacked.vectors, temperature)

    def surrogate(params, xs, vector_cotangent):
        """Its gradient is this micro-batch's part of the gradient of the total loss."""
        outputs = run(params, xs)
        own = sum(
            (weights[n] * loss.total / jnp.maximum(sums[0][n].weight, 1.0) for n, loss in outputs.losses.items()),
            jnp.zeros([]),
        )

        def through(cotangent: Array, vector: Array) -> Array:
            return jnp.sum(cotangent.astype(jnp.promote_types(cotangent.dtype, jnp.float32)) * vector)

        through_vectors = jax.tree.map(through, vector_cotangent, outputs.whole_batch.vectors)
        through_temperature = cotangents[1] * outputs.whole_batch.temperature / count
        return own + sum(jax.tree.leaves(through_vectors), jnp.zeros([])) + through_temperature

    def accumulate(gradient, xs):
        micro_batch, vector_cotangent = xs
        return jax.tree.map(jnp.add, gradient, jax.grad(surrogate)(params, micro_batch, vector_cotangent)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    gradient, _ = jax.lax.scan(accumulate, zeros, ((micro_batches, keys), cotangents[0]))
    return gradient, Outputs(sums[0] | compared, sums[1], stacked)


def make_step(
    task: Task,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    seed: int,
    accumulate: int = 1,
    dropout: bool = True,
    ema: float = 0.0,
) -> Callable[[TrainState, Batch, tuple[str, ...]], tuple[TrainState, Metrics]]:
    """The function (state, batch, active objectives) → (state, metrics); jit it with `active` static.

    All randomness comes from (seed, step, name): a resumed or differently sharded run draws the same. Where the loss or
    the norm of the gradient is not finite, parameters, moments and average stay as they were, to the bit; the number of
    the step, and with it the learning rate, moves on. The metric "skipped_updates" is then 1.
    """

    def step(state: TrainState, batch: Batch, active: tuple[str, ...]) -> tuple[TrainState, Metrics]:
        key: Key[Array, ""] = jax.random.fold_in(jax.random.key(seed), state.step)
        masks_key, dropout_key = jax.random.split(key)
        weights = task.weights(state.step)
        masks = task.draw_masks(batch, masks_key)
        arguments = (task, graph, state.params, batch, masks, active, weights, dropout_key if dropout else None)
        if accumulate == 1:
            gradient, outputs = whole_batch_gradient(*arguments)
        else:
            gradient, outputs = accumulated_gradient(*arguments, accumulate)
        total, norm = weighted_total(outputs.losses, weights), global_norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(gradient, state.opt_state, state.params, finite=finite)
            params: Any = optax.apply_updates(state.params, updates)
            params = task.constrain(params)
            average = state.ema and jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state.ema, params)
            params, average = keep_where_finite(finite, (params, average), (state.params, state.ema))
        metrics = {f"loss/{name}": loss.mean() for name, loss in outputs.losses.items()}
        metrics |= {f"accuracy/{name}": value.mean() for name, value in outputs.accuracies.items()}
        metrics["loss/total"], metrics["gradient_norm"] = total, norm
        metrics["learning_rate"] = jnp.asarray(schedule(state.step))
        metrics[SKIPPED] = 1.0 - finite
        if "contrastive" in params:
            metrics["temperature"] = params["contrastive"]["temperature"]
        return TrainState(state.step + 1, params, opt_state, average), metrics

    return step
