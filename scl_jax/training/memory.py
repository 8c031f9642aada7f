"""Memory of a training step: what is kept for the backward pass, what the compiler plans, what a device has."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from scl_jax.models.parameters import Params
from scl_jax.tasks.task import Task
from scl_jax.training.step import total_loss
from scl_jax.types import Batch


def kept_bytes(
    task: Task,
    graph: nnx.GraphDef,
    params: Params,
    batch: Batch,
    active: tuple[str, ...],
    *,
    accumulate: int = 1,
    dropout: bool = True,
) -> int:
    """Bytes that the forward pass of a micro-batch leaves for its backward pass, over all devices.

    Counted on the traced program, so within seconds; arguments may be shapes. A compiled program holds less where XLA
    fuses arrays into what reads them, and more where it pads them.
    """
    rows = batch.weight.shape[0] // accumulate
    micro_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)

    def pull_back(params: Params, batch: Batch, seed: jax.Array) -> Any:
        """The function that carries a cotangent back: its leaves are what has been kept."""
        key = jax.random.key(seed)
        fixed = (batch, task.draw_masks(batch, key), active, task.weights(0), key if dropout else None)
        return jax.vjp(lambda params: total_loss(task, graph, params, *fixed), params, has_aux=True)[1]

    kept = jax.eval_shape(pull_back, params, micro_batch, jax.ShapeDtypeStruct((), np.int32))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def planned_bytes(compiled: Any) -> int:
    """Bytes of one device that a compiled program needs: arguments, temporaries, results and code."""
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return held + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes


def device_memory() -> int | None:
    """Bytes that a program may use of that device of this process which has least; None where devices do not say."""
    return min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()) or None
