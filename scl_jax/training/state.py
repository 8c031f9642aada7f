"""What training carries from step to step, created sharded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from scl_jax.models import parameters
from scl_jax.models.parameters import Params
from scl_jax.training import sharding


@flax.struct.dataclass
class TrainState:
    """Parameters, optimizer state, their running average (or None) and the number of finished updates."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None = None


def plan_state(
    make_model: partial[Any],
    make_tx: Callable[[Params], optax.GradientTransformationExtraArgs],
    mesh: Mesh,
    with_ema: bool = False,
) -> tuple[nnx.GraphDef, optax.GradientTransformationExtraArgs, TrainState]:
    """(graph, optimizer, state as shapes with shardings): everything of a state but its numbers."""
    graph, shapes = parameters.abstract(make_model)
    tx = make_tx(shapes)
    step: Any = jax.ShapeDtypeStruct([], jnp.int32)
    state = TrainState(step, shapes, jax.eval_shape(tx.init, shapes), shapes if with_ema else None)
    layout = state_shardings(tx, shapes, mesh, with_ema)
    planned = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)
    return graph, tx, planned


def init_state(
    make_model: partial[Any],
    make_tx: Callable[[Params], optax.GradientTransformationExtraArgs],
    mesh: Mesh,
    seed: int,
    with_ema: bool = False,
) -> tuple[nnx.GraphDef, optax.GradientTransformationExtraArgs, TrainState]:
    """A fresh state whose every leaf is created where it belongs; nothing is replicated that the plan splits."""
    graph, tx, planned = plan_state(make_model, make_tx, mesh, with_ema)
    layout = jax.tree.map(lambda x: x.sharding, planned)

    def create(seed) -> TrainState:
        params = parameters.split(make_model(nnx.Rngs(jax.random.key(seed))))[1]
        return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), params if with_ema else None)

    return graph, tx, jax.jit(create, out_shardings=layout)(seed)


def state_shardings(
    tx: optax.GradientTransformationExtraArgs, shapes: Params, mesh: Mesh, with_ema: bool
) -> TrainState:
    """The sharding of every leaf of a state."""
    layout: Any = sharding.shard_params(shapes, mesh)
    step: Any = sharding.replicated(mesh)
    return TrainState(step, layout, sharding.shard_optimizer(tx, shapes, mesh), layout if with_ema else None)
