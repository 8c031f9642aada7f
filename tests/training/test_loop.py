"""The loop with a step that only counts: waiting for data, traces, and what is left when it ends early."""

import asyncio
import dataclasses
import errno
import os
import signal
import time
from dataclasses import MISSING
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import JsonCheckpointHandler

from scl_jax.training.checkpoint import Checkpoints
from scl_jax.training.logging import RunLog
from scl_jax.training.loop import Feed, Schedule, StopRequest, Window, train
from scl_jax.training.nonfinite import SKIPPED, Guard
from scl_jax.training.sharding import make_mesh
from scl_jax.training.state import TrainState
from scl_jax.types import Batch

SECONDS = 0.05


class SlowIterator:
    """Batches that take `SECONDS` each."""

    def get_state(self):
        return {}

    def __next__(self):
        time.sleep(SECONDS)
        fields = {field.name: np.zeros((8, 1)) for field in dataclasses.fields(Batch) if field.default is MISSING}
        return {"stream": "images", **fields}


class Running:
    """An array of a step that is still computed, or is not."""

    def __init__(self, ready):
        self.is_ready = lambda: ready


@pytest.mark.parametrize(("ready", "counts"), [((False, False), False), ((True, False), False), ((True, True), True)])
def test_waiting_counts_where_the_step_in_flight_has_ended(ready, counts):
    feed = Feed(SlowIterator(), make_mesh())
    feed.fetch([Running(r) for r in ready])
    assert (feed.waited >= SECONDS) if counts else (feed.waited == 0)


def test_waiting_for_the_first_batch_counts():
    feed = Feed(SlowIterator(), make_mesh())
    feed.take()
    assert feed.waited >= SECONDS


def test_what_a_checkpoint_got_of_a_window_stays_as_it_was():
    """Savers write it in the background while the loop goes on."""
    window = Window()
    window.add("images", {"loss/total": np.float32(2)})
    saved = window.state()
    window.add("images", {"loss/total": np.float32(3)})
    window.means()
    assert saved == {"loss/images/total": [2.0, 1.0], "skipped_updates": [0.0, 1.0]}


class Batches:
    """Batches that are there at once; `before(number)` is called before the number-th."""

    def __init__(self, before=lambda number: None):
        self.before, self.number = before, 0

    def get_state(self):
        return {"number": self.number}

    def __next__(self):
        self.number += 1
        self.before(self.number)
        fields = {field.name: np.zeros((8, 1)) for field in dataclasses.fields(Batch) if field.default is MISSING}
        return {"stream": "images", **fields}


def count(state, batch, active):
    """A step."""
    return dataclasses.replace(state, step=state.step + 1), {"loss/total": 1.0 * state.step, SKIPPED: jnp.zeros([])}


def run(workdir, begin=0, before=lambda number: None, evaluate=lambda state: {}, **schedule):
    """(last state, whether complete) of six steps, saved every other one."""
    plan = dataclasses.replace(Schedule(6, log_every=2, checkpoint_every=2, evaluate_every=0), **schedule)
    state = TrainState(jnp.asarray(begin, jnp.int32), {"x": jnp.ones(2)}, (), None)
    checkpoints, task = Checkpoints(workdir / "checkpoints"), SimpleNamespace(active=lambda step: ())
    with RunLog(workdir, 6, console=False, tensorboard=False) as log:
        step, guard = jax.jit(count, static_argnums=2), Guard(workdir / "nonfinite", 10, 0)
        arguments = (task, step, state, Batches(before), make_mesh(), plan, checkpoints, log)
        return train(*arguments, evaluate, Window(), guard, 60)


@pytest.fixture
def traces(monkeypatch):
    """What the profiler was told, with JAX's own errors."""
    told: list[str] = []

    def start(folder):
        assert told[-1:] != ["start"]
        told.append("start")

    def stop():
        assert told[-1:] == ["start"], "no trace was started"
        told.append("stop")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    return told


@pytest.mark.parametrize(
    ("begin", "window", "traced"),
    [(0, (2, 4), True), (0, (4, 9), True), (3, (2, 4), True), (4, (2, 4), False), (0, (0, 0), False)],
    ids=["within the run", "past its end", "continued within", "continued at its end", "off"],
)
def test_a_trace_is_of_the_steps_of_the_window_that_this_process_does(tmp_path, traces, begin, window, traced):
    run(tmp_path, begin, profile=window)
    assert traces == ["start", "stop"] * traced


def test_a_trace_is_written_when_a_signal_ends_the_run(tmp_path, traces):
    state, complete = run(
        tmp_path, profile=(1, 5), before=lambda number: number == 3 and os.kill(os.getpid(), signal.SIGTERM)
    )
    assert not complete and int(state.step) < 4 and traces == ["start", "stop"]


def test_a_signal_in_the_last_step_ends_the_run_too(tmp_path):
    """Else it would go on into the final evaluation, for as long as that takes."""
    state, complete = run(
        tmp_path, evaluate_last=True, evaluate=lambda state: os.kill(os.getpid(), signal.SIGTERM) or {}
    )
    assert not complete and int(state.step) == 6
    assert (tmp_path / "checkpoints/6").is_dir()


def test_a_signal_while_the_last_save_is_under_way_lets_it_become_whole(tmp_path, monkeypatch):
    wait = Checkpoints.wait
    monkeypatch.setattr(Checkpoints, "wait", lambda self: (signal.raise_signal(signal.SIGTERM), wait(self)))
    assert run(tmp_path)[1] is False
    assert (tmp_path / "checkpoints/6").is_dir()


def test_ctrl_c_is_passed_on_to_the_handler_that_many_processes_have(monkeypatch):
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) == before[1]
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.fixture
def slow_saves(monkeypatch):
    """What the last save does in the background takes half a second more."""
    plain = JsonCheckpointHandler._save_fn

    async def slow(*arguments):
        await asyncio.sleep(0.5)
        return await plain(*arguments)

    monkeypatch.setattr(JsonCheckpointHandler, "_save_fn", slow)


def test_an_error_after_a_save_is_raised_when_the_save_is_whole(tmp_path, slow_saves):
    """Else the process would end in the middle of it, with the tracebacks of its threads."""

    def broken(number):
        if number == 4:
            raise ValueError("record 36: cannot decode JPEG")

    with pytest.raises(ValueError, match="record 36"):
        run(tmp_path, before=broken)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_an_error_is_not_replaced_by_that_of_the_save_under_way(tmp_path, monkeypatch):
    def broken(number):
        if number == 4:
            raise ValueError("record 36: cannot decode JPEG")

    async def fails(*_):
        await asyncio.sleep(0.5)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(JsonCheckpointHandler, "_save_fn", fails)
    with pytest.raises(ValueError, match="record 36"):
        run(tmp_path, before=broken)
