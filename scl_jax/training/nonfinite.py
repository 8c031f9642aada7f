"""Steps whose loss or gradient was not finite: their update is skipped on the device, here they are counted and kept.

    <workdir>/nonfinite/step_<N>.json   seed, stream, examples and losses of step N, and its place in the data

`python -m scl_jax.replay <workdir>` makes the batch again from that. The host reads whether a step was skipped when it
is over anyway, one step behind the device, so looking costs no waiting.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool

from scl_jax.training.records import write_json
from scl_jax.training.sharding import whole

SKIPPED = "skipped_updates"  # the metric: 1 where the update of a step was skipped
KEPT = 100  # records; later steps are counted only
LOSS = "loss/"


class NonFiniteError(ValueError):
    """Too many steps in a row were not finite; `objectives` are those whose loss was not, maybe none."""

    def __init__(self, message: str, objectives: tuple[str, ...], record: dict[str, Any]):
        super().__init__(message)
        self.objectives, self.record = objectives, record
        self.state: Any = None  # of training when it ended


def keep_where_finite(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` where all was finite, else `old`, leaf by leaf."""
    return jax.tree.map(lambda new, old: jax.numpy.where(finite, new, old), new, old)


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What is to be known of a step if it turns out not to be finite."""

    step: int  # as metrics.jsonl counts: its update is the step-th
    stream: str
    place: dict[str, Any]  # of the data iterator before its batch
    item_id: Array
    metrics: Mapping[str, Array]


class Guard:
    """Counts skipped updates, keeps what is needed to look at them, and ends a run that gets no further.

    Args:
        folder: <workdir>/nonfinite.
        limit: so many skipped updates in a row end the run.
        seed: of the run, for the record.
        say: prints a line.
        writes: whether this process writes.
        in_row: skipped updates up to the checkpoint that the run continues from.
        on_skip: called with the step of a record, so that the checkpoint before it is kept.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        seed: int,
        say: Callable[[str], None] = lambda _: None,
        writes: bool = True,
        in_row: int = 0,
        on_skip: Callable[[int], None] = lambda _: None,
    ):
        self._folder, self._limit, self._seed = folder, limit, seed
        self._say, self._writes, self._on_skip = say, writes, on_skip
        self._waiting: list[Dispatched] = []
        self.in_row = in_row

    def add(self, dispatched: Dispatched) -> None:
        """A step was dispatched; its flag sets out for the host as soon as it is computed."""
        dispatched.metrics[SKIPPED].copy_to_host_async()
        self._waiting.append(dispatched)

    def settle(self, leave: int = 0) -> None:
        """Waits for all steps but the `leave` newest, and looks whether they were skipped.

        Raises:
            NonFiniteError: so many in a row were that the run ends.
        """
        while len(self._waiting) > leave:
            oldest = self._waiting.pop(0)
            if not float(np.asarray(oldest.metrics[SKIPPED])):
                self.in_row = 0
                continue
            self.in_row += 1
            record = self._record(oldest)
            if self.in_row >= self._limit:
                raise self._error(record)

    def _record(self, step: Dispatched) -> dict[str, Any]:
        numbers = {name: float(value) for name, value in jax.device_get(dict(step.metrics)).items()}
        record = {
            "step": step.step,
            "seed": self._seed,
            "stream": step.stream,
            "item_id": whole(step.item_id).tolist(),
            "losses": {n.removeprefix(LOSS): _plain(x) for n, x in numbers.items() if n.startswith(LOSS)},
            "gradient_norm": _plain(numbers["gradient_norm"]),
            "data": step.place,
        }
        self._on_skip(step.step)
        path, kept = record_path(self._folder, step.step), records(self._folder)
        if step.step in kept or len(kept) < KEPT:
            if self._writes:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_json(path, record)
            self._say(
                f"step {step.step}: {culprits(record)} not finite; the update is skipped, its batch kept in {path}"
            )
            if len(kept) == KEPT - 1:
                self._say(f"{self._folder} is full: later skipped updates are counted in metrics.jsonl, not kept")
        return record

    def _error(self, record: dict[str, Any]) -> NonFiniteError:
        last = record["step"]
        return NonFiniteError(
            f"{self.in_row} updates in a row, up to step {last}, were skipped: {culprits(record)} not finite. "
            f"`python -m scl_jax.replay {self._folder.parent}` shows where that begins; the checkpoints are sound. "
            f"Raise train.max_nonfinite_in_row (now {self._limit}) to go on past such batches.",
            nonfinite_losses(record),
            record,
        )


def nonfinite_losses(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The objectives of a record whose loss was not finite."""
    return tuple(name for name, loss in record["losses"].items() if name != "total" and isinstance(loss, str))


def culprits(record: Mapping[str, Any]) -> str:
    """ "the loss of matching is", "the gradient, though every loss was finite, is": what was not finite."""
    names = nonfinite_losses(record)
    if names:
        return f"the loss{'es' if len(names) > 1 else ''} of {', '.join(names)} {'are' if len(names) > 1 else 'is'}"
    return "the gradient, though every loss is finite, is"


def record_path(folder: Path, step: int) -> Path:
    """Where the record of a step lies."""
    return folder / f"step_{step}.json"


def records(folder: Path) -> list[int]:
    """The steps that have a record, in order."""
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.json"))


def read_record(folder: Path, step: int) -> dict[str, Any] | None:
    """The record of a step, None where there is none."""
    path = record_path(folder, step)
    return json.loads(path.read_text()) if path.exists() else None


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
