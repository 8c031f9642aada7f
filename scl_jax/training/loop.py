"""The training loop: batches in, steps, logs, evaluations, checkpoints; it continues where a checkpoint left off.

A step is dispatched, then the next batch is fetched while the device works; a CPU that keeps its memory finishes the
step first (`host_memory.py`). Metrics stay on the device until a line of the log is due, so the loop never waits for
the device except to keep no more than two steps in flight.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from scl_jax.tasks.task import Task
from scl_jax.training.checkpoint import Checkpoints
from scl_jax.training.distributed import CompiledTogether
from scl_jax.training.flops import count_flops, peak_flops
from scl_jax.training.logging import RunLog
from scl_jax.training.nonfinite import SKIPPED, Dispatched, Guard, NonFiniteError
from scl_jax.training.sharding import global_batch
from scl_jax.training.state import TrainState
from scl_jax.types import FIELDS, Batch

Evaluate = Callable[[TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen, in steps; `evaluate_every` 0 means not while training."""

    steps: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int
    profile: tuple[int, int] = (0, 0)
    evaluate_last: bool = False  # so that the last step takes part in the choice of the best

    def evaluates(self, step: int) -> bool:
        """Whether step number `step` is followed by an evaluation."""
        if step >= self.steps:
            return self.evaluate_last
        return self.evaluate_every > 0 and step % self.evaluate_every == 0

    def saves(self, step: int) -> bool:
        """Whether step number `step` is followed by a checkpoint."""
        return step % self.checkpoint_every == 0 or step == self.steps or self.evaluates(step)


class Window:
    """Sums of metrics since the last line of the log, by stream; part of a checkpoint, so that resuming is exact.

    Metrics wait on the device as arrays and are summed on the host, in order, only when somebody asks. Of a step whose
    update was skipped only that is counted: means are over the others.
    """

    def __init__(self, state: dict[str, list[float]] | None = None):
        self._sums: dict[str, list[float]] = {name: list(pair) for name, pair in (state or {}).items()}  # sum, count
        self._waiting: list[tuple[str, dict[str, Any]]] = []

    def add(self, stream: str, metrics: dict[str, Any]) -> None:
        """Takes the metrics of one step, still on the device."""
        self._waiting.append((stream, metrics))

    def state(self) -> dict[str, list[float]]:
        """Sum and count of every metric, named "loss/<stream>/<objective>"; a copy: savers read it later."""
        for stream, metrics in self._waiting:
            values = jax.device_get(metrics)
            skipped = float(values.pop(SKIPPED, 0.0))
            total = self._sums.setdefault(SKIPPED, [0.0, 1.0])  # a number of steps, not a mean
            total[0] += skipped
            for name, value in ({} if skipped else values).items():
                kind, _, rest = name.partition("/")
                pair = self._sums.setdefault(f"{kind}/{stream}/{rest}" if rest else name, [0.0, 0.0])
                pair[0] += float(value)
                pair[1] += 1.0
        self._waiting = []
        return {name: list(pair) for name, pair in self._sums.items()}

    def means(self) -> dict[str, float]:
        """The means, and an empty window."""
        means = {name: total / count for name, (total, count) in self.state().items()}
        self._sums = {}
        return means


class Fed(NamedTuple):
    """A batch on the device, and the state of the data iterator before and after it."""

    stream: str
    batch: Batch
    before: dict[str, Any]
    after: dict[str, Any]


class Feed:
    """The next batch on the device, and the seconds that the device can have waited for it."""

    def __init__(self, iterator: Any, mesh: Mesh):
        self._iterator, self._mesh = iterator, mesh
        self.waited = 0.0
        self._next: Fed | None = None

    def fetch(self, running: Any = ()) -> None:
        """Gets the batch that the next call of `take` returns.

        Args:
            running: what the step in flight returns. While it is computed nothing waits but this thread: where the
                batch comes before its end, the device lost no time. Where the batch comes later all of the time counts
                as waiting, so that `waited` is never too small.
        """
        start, before = time.perf_counter(), self._iterator.get_state()
        arrays = next(self._iterator)
        if all(array.is_ready() for array in jax.tree.leaves(running)):
            self.waited += time.perf_counter() - start
        stream = arrays.pop("stream")
        fields = {name: arrays[name] for name in FIELDS if name in arrays}
        batch = Batch(**global_batch(fields, self._mesh))
        self._next = Fed(stream, batch, before, self._iterator.get_state())

    def take(self) -> Fed:
        """The next batch."""
        if self._next is None:
            self.fetch()
        assert self._next is not None
        batch, self._next = self._next, None
        return batch


class StopRequest:
    """Notices SIGTERM (and the first Ctrl-C), so that the loop can save and end; restores the handlers afterwards.

    Where several processes run, JAX's own handler of SIGTERM stays: a signal to any of them makes all agree, in the
    background, on a step that none has passed yet. Ctrl-C is passed on to it.
    """

    def __enter__(self) -> StopRequest:
        self.received = self._passed_on = False
        handlers: dict[int, Any] = {signal.SIGTERM: self._handle, signal.SIGINT: self._handle}
        if jax.process_count() > 1:
            handlers = {signal.SIGINT: self._pass_on}
        self._old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def stops_after(self, step: int) -> bool:
        """Whether to save after this step and end; to be asked once at every step."""
        self.received = self.received or multihost_utils.reached_preemption_sync_point(step)
        return self.received

    def _handle(self, number: int, frame: Any) -> None:
        if self.received:  # a second time: at once
            raise KeyboardInterrupt
        self.received = True

    def _pass_on(self, number: int, frame: Any) -> None:
        if self._passed_on:
            raise KeyboardInterrupt
        self._passed_on = True
        os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Profile:
    """A trace of the steps of this process after step number `first`, up to number `last`; none where both are 0."""

    def __init__(self, folder: Path, first: int, last: int):
        self._folder, self._first, self._last = folder, first, last
        self._tracing = False

    def begin(self, number: int) -> None:
        """Step `number` is done, the next one not yet dispatched; a run may be continued within the window."""
        if self._first <= number < self._last and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def end(self, number: int, metrics: Any, last: bool) -> None:
        """Writes the trace where step `number`, which gave these metrics, is the last of the window or of all."""
        if self._tracing and (number >= self._last or last):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._tracing = False


class Speed:
    """Examples per second, share of time that the device waited for data at most, and MFU where its peak is known.

    All since the last line of the log.
    """

    def __init__(self, feed: Feed, step_function: Callable, mesh: Mesh):
        self._feed, self._step_function = feed, step_function
        peak = peak_flops(mesh.devices.flat[0])
        self._peak = peak * mesh.devices.size if peak else None
        self._flops_of: dict[Any, float] = {}
        self.reset()

    def reset(self) -> None:
        """Starts a new line of the log."""
        self._start, self._waited, self._examples, self._flops = time.perf_counter(), self._feed.waited, 0, 0.0

    def add(self, state: TrainState, batch: Batch, active: tuple[str, ...]) -> None:
        """A step was dispatched."""
        self._examples += batch.weight.shape[0]
        if self._peak:
            kind = (batch.pixels.shape, active)
            if kind not in self._flops_of:
                shapes = jax.eval_shape(lambda *xs: xs, state, batch)
                self._flops_of[kind] = count_flops(self._step_function, *shapes, active, static_argnums=(2,))
            self._flops += self._flops_of[kind]

    def read(self) -> dict[str, float]:
        """The numbers of this line; starts a new one."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        read = {
            "speed/examples_per_second": self._examples / seconds,
            "speed/data_wait": (self._feed.waited - self._waited) / seconds,
        }
        if self._peak:
            read["speed/mfu"] = self._flops / seconds / self._peak
        self.reset()
        return read


def train(
    task: Task,
    step_function: Callable,
    state: TrainState,
    iterator: Any,
    mesh: Mesh,
    schedule: Schedule,
    checkpoints: Checkpoints,
    log: RunLog,
    evaluate: Evaluate,
    window: Window,
    guard: Guard,
    compile_timeout: int,
) -> tuple[TrainState, bool]:
    """Trains from `state.step` to `schedule.steps`.

    Args:
        step_function: jitted (state, batch, active) → (state, metrics) that donates the state.
        iterator: of the data set, standing behind the last batch that `state` has seen.
        evaluate: the metrics of a state, for the log and the choice of the best checkpoint.
        window: metrics since the last line of the log, from the checkpoint.
        guard: counts the steps that were not finite.
        compile_timeout: seconds that processes wait for each other's compilers.

    Returns:
        The last state, and whether training is complete (False after SIGTERM, in the last step, too: saved, to be
        continued).

    Raises:
        NonFiniteError: too many steps in a row were not finite; its `state` is the last one.
    """
    feed = Feed(iterator, mesh)
    speed = Speed(feed, step_function, mesh)
    number = int(state.step)
    compiled_together = CompiledTogether(compile_timeout)
    profile = Profile(log.workdir / "profile", *schedule.profile)
    with StopRequest() as stop, checkpoints.completed():
        while number < schedule.steps:
            profile.begin(number)
            stream, batch, before, after = feed.take()
            compiled_together(step_function, state, batch, task.active(number))
            state, metrics = step_function(state, batch, task.active(number))
            number += 1
            window.add(stream, metrics)
            guard.add(Dispatched(number, stream, before, batch.item_id, metrics))
            speed.add(state, batch, task.active(number - 1))
            if number < schedule.steps:
                feed.fetch(metrics)
            _settle(guard, state, leave=1)
            profile.end(number, metrics, last=number == schedule.steps)
            log.status(number)
            if number % schedule.log_every == 0 or number == schedule.steps:
                log.write(number, {**window.means(), **speed.read()})
            results = None
            if schedule.evaluates(number):
                results = evaluate(state)
                log.write(number, results)
            stopping = stop.stops_after(number)
            profile.end(number, metrics, last=stopping)
            if schedule.saves(number) or stopping:
                _settle(guard, state)
                progress = {"data": after, "window": window.state(), "skipped_in_row": guard.in_row}
                checkpoints.save(number, state, progress, results)
            if results or stopping:
                speed.reset()
            if stopping:
                break
        checkpoints.wait()
    return state, number >= schedule.steps and not stop.received


def _settle(guard: Guard, state: TrainState, leave: int = 0) -> None:
    try:
        guard.settle(leave)
    except NonFiniteError as error:
        error.state = state
        raise
