"""A step taken apart by objective: whose loss or gradient is not finite, and which operation gave the first NaN.

Used by `scl_jax.replay`, and by a run that ends because only its gradient was not finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import checkify
from jax.sharding import Mesh
from jaxtyping import Array, Key

from scl_jax.models import parameters
from scl_jax.models.parameters import Params
from scl_jax.models.scl import SCL
from scl_jax.partition import on_mesh
from scl_jax.tasks.task import Outputs, Task, WholeBatch
from scl_jax.training.state import TrainState
from scl_jax.training.step import accumulated_gradient, weighted_total, whole_batch_gradient
from scl_jax.types import Batch, LossSum

PACKAGE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Only:
    """A task reduced to one of its losses: same views, same masks, same dropout, but nothing else in the gradient."""

    task: Task
    objective: str

    @property
    def group_size(self) -> int:
        """As the task's."""
        return self.task.group_size

    def features(
        self, model: SCL, batch: Batch, masks: Any, active: Collection[str], key: Key[Array, ""] | None
    ) -> Outputs:
        """The task's outputs without the other losses, and without the vectors that only they compare."""
        outputs = self.task.features(model, batch, masks, active, key)
        whole, vectors = outputs.whole_batch, outputs.whole_batch.vectors
        if any(name.startswith(tuple(active)) for name in vectors):  # named by their objective
            vectors = {name: x for name, x in vectors.items() if name.startswith(self.objective)}
        return dataclasses.replace(
            outputs, losses=self._own(outputs.losses), whole_batch=dataclasses.replace(whole, vectors=vectors)
        )

    def whole_batch_losses(self, features: WholeBatch) -> dict[str, LossSum]:
        """The one loss, where it compares the whole batch."""
        return self._own(self.task.whole_batch_losses(features))

    def _own(self, losses: dict[str, LossSum]) -> dict[str, LossSum]:
        return {name: loss for name, loss in losses.items() if name == self.objective}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One objective of one batch."""

    objective: str
    loss: float
    weight: float
    gradient_norm: float
    parameters: tuple[str, ...]  # whose gradient is not finite
    first: str  # the first operation that gave NaN, where a number is not finite

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are."""
        return bool(np.isfinite(self.loss) and np.isfinite(self.gradient_norm))


class Inspection:
    """Takes a step of a run apart by objective, with the numbers that `make_step` would have drawn."""

    def __init__(self, task: Task, graph: nnx.GraphDef, mesh: Mesh, *, seed: int, accumulate: int, dropout: bool):
        self._task, self._graph, self._mesh = task, graph, mesh
        self._seed, self._accumulate, self._dropout = seed, accumulate, dropout

    def __call__(self, state: TrainState, batch: Batch) -> list[Finding]:
        """The findings of every objective that takes part in the step after `state`."""
        number = int(state.step)
        return [self._of(name, state.params, batch, number) for name in self._task.active(number)]

    def _gradient(self, objective: str, number: int, params: Params, batch: Batch) -> tuple[Params, Array, Array]:
        """(gradient, mean loss, weight) of one objective."""
        active = self._task.active(number)
        masks_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(self._seed), number))
        masks = self._task.draw_masks(batch, masks_key)
        weights = self._task.weights(jnp.asarray(number))
        key = dropout_key if self._dropout else None
        task: Any = Only(self._task, objective)
        arguments = (task, self._graph, params, batch, masks, active, weights, key)
        if self._accumulate == 1:
            gradient, outputs = whole_batch_gradient(*arguments)
        else:
            gradient, outputs = accumulated_gradient(*arguments, self._accumulate)
        return gradient, weighted_total(outputs.losses, {objective: 1.0}), jnp.asarray(weights[objective])

    def _of(self, objective: str, params: Params, batch: Batch, number: int) -> Finding:
        def compute(params: Params, batch: Batch):
            gradient, loss, weight = self._gradient(objective, number, params, batch)
            bad = jax.tree.map(lambda x: ~jnp.isfinite(x).all(), gradient)
            return loss, weight, optax.tree.norm(gradient), bad

        loss, weight, norm, bad = jax.jit(on_mesh(self._mesh, compute))(params, batch)
        names = tuple(name for name, is_bad in parameters.flatten(bad).items() if bool(is_bad))
        finding = Finding(objective, float(loss), float(weight), float(norm), names, "")
        return finding if finding.finite else dataclasses.replace(finding, first=self._first(compute, params, batch))

    def _first(self, compute: Any, params: Params, batch: Batch) -> str:
        """Which operation of forward or backward pass gives the first NaN, and its line."""
        checked = checkify.checkify(on_mesh(self._mesh, compute), errors=checkify.nan_checks)
        error, _ = jax.jit(checked)(params, batch)
        if error.get() is None:
            return "infinity: numbers overflow, no operation gives NaN"
        found: Any = error.get_exception()
        return f"NaN from {found.prim}{_place_of(found.traceback_info.frames)}"


def _place_of(frames: Any) -> str:
    """The innermost line of a traceback that is ours, not a library's."""
    for frame in frames:
        path = Path(frame.file_name)
        if path.is_relative_to(PACKAGE) or not {"site-packages", "dist-packages"} & set(path.parts):
            name = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE.parent) else path
            return f" at {name}:{frame.line_num}, in {frame.function_name.split('.')[-1]}"
    return ""


def described(findings: list[Finding]) -> list[str]:
    """The table of objectives, and where numbers that are not finite begin."""
    lines = [f"{'objective':18}{'loss':>12}{'weight':>9}{'gradient':>12}"]
    for f in findings:
        lines.append(f"{f.objective:18}{f.loss:12.5g}{f.weight:9.3g}{f.gradient_norm:12.5g}")
    for f in findings:
        if not f.finite:
            whose = f"gradient of {len(f.parameters)} parameter(s), such as {f.parameters[0]}" if f.parameters else ""
            lines.append(f"{f.objective}: first {f.first}{'; not finite: ' + whose if whose else ''}")
    return lines if any(not f.finite for f in findings) else [*lines, "every loss and every gradient is finite"]


def of_parameters(params: Params) -> list[str]:
    """Parameters that are not finite themselves."""
    bad = [name for name, x in parameters.flatten(params).items() if not bool(jnp.isfinite(x).all())]
    return [f"parameters that are not finite: {', '.join(bad)}"] if bad else ["every parameter is finite"]
