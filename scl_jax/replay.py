"""Looks at a step again: `python -m scl_jax.replay <workdir> [--step=N]`, the last that was not finite by default.

The run is continued in memory, bit for bit, from the newest checkpoint before the step, and the step's batch and masks
are made again. For every objective it prints loss, weight and norm of the gradient, and for those that are not finite
the first operation that gave NaN. Nothing is written; a run may be using the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from jax.experimental import checkify
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from scl_jax.config import default_config
from scl_jax.data.pipeline import Records
from scl_jax.models import parameters
from scl_jax.models.parameters import Params
from scl_jax.models.scl import SCL
from scl_jax.partition import on_mesh
from scl_jax.tasks.task import Outputs, Task, WholeBatch
from scl_jax.training.checkpoint import Checkpoints, abstract_state
from scl_jax.training.loop import Feed
from scl_jax.training.nonfinite import NonFiniteError, read_record, records
from scl_jax.training.state import TrainState
from scl_jax.training.step import accumulated_gradient, weighted_total, whole_batch_gradient
from scl_jax.types import Batch, LossSum

PACKAGE = Path(__file__).parent
SHOWN = 32  # examples that are listed


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

    def __init__(self, config: ConfigDict, task: Task, graph: nnx.GraphDef, mesh: Any):
        self._config, self._task, self._graph, self._mesh = config, task, graph, mesh

    def __call__(self, state: TrainState, batch: Batch) -> list[Finding]:
        """The findings of every objective that takes part in the step after `state`."""
        number = int(state.step)
        return [self._of(name, state.params, batch, number) for name in self._task.active(number)]

    def _gradient(self, objective: str, number: int, params: Params, batch: Batch) -> tuple[Params, Array, Array]:
        """(gradient, mean loss, weight) of one objective."""
        m, count = self._config.model, self._config.train.accumulate
        active = self._task.active(number)
        masks_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(self._config.seed), number))
        key = dropout_key if m.dropout > 0 or m.attention_dropout > 0 else None
        masks = self._task.draw_masks(batch, masks_key)
        weights = self._task.weights(jnp.asarray(number))
        arguments: Any = (Only(self._task, objective), self._graph, params, batch, masks, active, weights, key)
        gradient, outputs = whole_batch_gradient(*arguments) if count == 1 else accumulated_gradient(*arguments, count)
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
        """Which operation of forward or backward pass gives the first NaN, and its line of this package."""
        checked = checkify.checkify(on_mesh(self._mesh, compute), errors=checkify.nan_checks)
        error, _ = jax.jit(checked)(params, batch)
        said = error.get() or "no operation gives NaN: the numbers overflow to infinity"
        lines = re.findall(rf"{re.escape(str(PACKAGE))}/([^\s:]+:\d+)", said)
        return " ".join([*said.splitlines()[0].split(), *(f"({line})" for line in lines[:1])])


def blame(session: Any, graph: nnx.GraphDef, error: NonFiniteError) -> list[str]:
    """The objectives whose gradient is not finite in the step that ended a run, whose state has not moved since."""
    record = error.record
    batch = batch_at(session, record["data"])
    state = dataclasses.replace(error.state, step=jnp.asarray(record["step"] - 1, jnp.int32))
    findings = Inspection(session.config, session.task, graph, session.mesh)(state, batch)
    return [f"of {f.objective}, first {f.first}" for f in findings if not f.finite] or ["of no objective alone"]


def batch_at(session: Any, place: dict[str, Any]) -> Batch:
    """The training batch at a place of the data iterator."""
    iterator = iter(session.training_data())
    iterator.set_state(place)
    return Feed(iterator, session.mesh).take().batch


def replay(session: Any, step: int | None = None) -> tuple[list[Finding], list[str]]:
    """Goes through a step of a run again.

    Args:
        session: of the work directory.
        step: as metrics.jsonl counts, from 1; None: the last one with a record.

    Returns:
        The findings by objective, and lines that say what they mean.

    Raises:
        ValueError: no step is named and none has a record.
    """
    folder = session.workdir / "nonfinite"
    known = records(folder)
    if step is None:
        if not known:
            raise ValueError(f"{folder} holds no record of a step that was not finite; name a step: --step=N")
        step = known[-1]
    if not 1 <= step <= session.config.train.steps:
        raise ValueError(f"--step is {step}; steps of this run are numbered 1 to {session.config.train.steps}")
    session.checkpoints = Checkpoints(session.workdir / "checkpoints", read_only=True)
    begun = session.checkpoints.newest_before(step)
    graph, tx, state = session.initial_state()
    iterator = iter(session.training_data())
    if begun is not None:
        state, progress = session.checkpoints.restore(abstract_state(state), begun)
        iterator.set_state(progress["data"])
    elif session.checkpoints.latest() is not None:
        raise ValueError(f"{session.workdir}: no checkpoint before step {step} is left")
    print(f"from {'the start' if begun is None else f'checkpoint {begun}'} to step {step}", flush=True)
    feed, step_function = Feed(iterator, session.mesh), session.jit_step(graph, tx, state)
    for number in range(int(state.step), step - 1):
        state, _ = step_function(state, feed.take().batch, session.task.active(number))
    fed = feed.take()
    findings = Inspection(session.config, session.task, graph, session.mesh)(state, fed.batch)
    return findings, [
        *described(findings),
        *of_parameters(state.params),
        *of_batch(session, fed.stream, fed.batch),
        *of_record(read_record(folder, step), fed),
    ]


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


def of_batch(session: Any, stream: str, batch: Batch) -> list[str]:
    """The examples of a batch by data set and id, and numbers in it that are not finite."""
    items = np.asarray(batch.item_id).tolist()
    records = Records(session.config.data[stream].datasets, "train", session.config.data.dir)
    lines = [f"batch of {len(items)} {stream}:"]
    lines += [f"  row {row}: {records[item].origin}" for row, item in enumerate(items[:SHOWN]) if item >= 0]
    if len(items) > SHOWN:
        lines.append(f"  … and {len(items) - SHOWN} more")
    floats = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    bad = [name for name, x in floats.items() if x is not None and not bool(jnp.isfinite(x).all())]
    return [*lines, f"not finite in the batch itself: {', '.join(bad)}"] if bad else lines


def of_record(record: dict[str, Any] | None, fed: Any) -> list[str]:
    """Whether the batch is the one that the run kept."""
    if record is None:
        return []
    same = record["item_id"] == np.asarray(fed.batch.item_id).tolist() and record["stream"] == fed.stream
    if not same:
        raise ValueError("the data gives another batch than the run had: its shards have changed")
    return ["the batch is the one of the run's record"]


def run_config(workdir: Path) -> ConfigDict:
    """The config that a work directory was begun with.

    Raises:
        FileNotFoundError: it holds none.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: give the work directory of a run")
    config = default_config().unlock()
    config.update(json.loads(file.read_text()))
    return config.lock()


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scl_jax.replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workdir", type=Path, help="of the run")
    parser.add_argument("--step", type=int, help="as metrics.jsonl counts; default: the last that was not finite")
    options = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.WARNING)
    from scl_jax.session import Session  # it needs this module, too

    try:
        findings, lines = replay(Session(run_config(options.workdir), options.workdir, "replay"), options.step)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))
    sys.exit(0 if all(f.finite for f in findings) else 3)


if __name__ == "__main__":
    main()
