"""Checkpoints: model, optimizer and place in the data in one Orbax save, asynchronous; the newest and the best kept.

<workdir>/checkpoints/<step>/state/      the TrainState, sharded
<workdir>/checkpoints/<step>/progress/   JSON: the data iterator and the metrics since the last line of the log
<workdir>/checkpoints/<step>/metrics/    the evaluation at that step, where there was one
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from scl_jax.training.state import TrainState

# Orbax warns at every save between two evaluations
logging.getLogger("absl").addFilter(lambda record: "did not provide metrics" not in record.getMessage())


class Checkpoints:
    """The checkpoints of one work directory.

    Args:
        folder: <workdir>/checkpoints, made when missing.
        keep_latest, keep_best: how many of the newest, and of the best by `best_metric`, are kept.
    """

    def __init__(self, folder: Path | str, keep_latest: int = 2, keep_best: int = 1, best_metric: str = ""):
        policies: list[Any] = [checkpoint_managers.LatestN(n=keep_latest)]
        if keep_best and best_metric:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best_metric = best_metric
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            # without it, metrics are not written, and a restarted run forgets which checkpoint is the best
            best_fn=(lambda metrics: metrics[best_metric]) if best_metric else None,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def latest(self) -> int | None:
        """The newest step, None without any."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step whose `best_metric` is highest, the earliest of several; None where none was evaluated."""
        scored = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        values = {step: metrics[self._best_metric] for step, metrics in scored.items() if metrics}
        return max(sorted(values), key=values.__getitem__, default=None)

    def save(
        self, step: int, state: TrainState, progress: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving; the state may be donated to the next step at once."""
        scored = {name: float(value) for name, value in metrics.items()} if metrics else None
        if scored is not None and self._best_metric not in scored:
            scored = None
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)),
            metrics=scored,
        )

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state, laid out as `abstract` (ShapeDtypeStructs with shardings), and the progress of a step.

        Raises:
            FileNotFoundError: there is no checkpoint.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
        )
        return restored.state, restored.progress

    def wait(self) -> None:
        """Until the last save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, types and shardings of a state."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
