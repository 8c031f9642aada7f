"""Several processes on one machine, two virtual devices each, are one run: same examples, losses and checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toy_run

from scl_jax.training.checkpoint import Checkpoints

STEPS = 12
SMALL = (
    f"--config.train.steps={STEPS}",
    "--config.train.checkpoint_every=4",
    "--config.data.videos.share=0.0",
    "--config.evaluate.max_items=8",
    "--config.objectives.group_size=4",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    return toy_run.prepare(tmp_path_factory.mktemp("toy_data"))


class Run:
    """`count` processes with `devices` devices each on one work directory; what they print goes to files beside it."""

    def __init__(self, data_dir: Path, workdir: Path, count: int, devices: int, *overrides: str):
        self.workdir = workdir
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        attempt = len(list(workdir.parent.glob(f"{workdir.name}.*.log")))
        self.processes, self.logs, self.records = [], [], []
        for index in range(count):
            self.logs.append(workdir.parent / f"{workdir.name}.{attempt}.{index}.log")
            self.records.append(workdir.parent / f"{workdir.name}.{attempt}.{index}.jsonl")
            together = (f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={index}")
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COMPILATION_CACHE_DIR": str(toy_run.ROOT / ".pytest_cache/xla"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "RECORD": str(self.records[-1]),
                "PYTHONPATH": str(toy_run.ROOT),
            }
            with self.logs[-1].open("w") as log:
                command = [sys.executable, "tests/recording_main.py", f"--config=tests/toy_config.py:{data_dir}"]
                arguments = [f"--workdir={workdir}", *SMALL, *(together if count > 1 else ()), *overrides]
                process = subprocess.Popen(
                    command + arguments, cwd=toy_run.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
                self.processes.append(process)

    def said(self) -> str:
        return "\n".join(f"── process {i}\n{log.read_text()[-3000:]}" for i, log in enumerate(self.logs))

    def ends_well(self) -> Run:
        assert [process.wait(1200) for process in self.processes] == [0] * len(self.processes), self.said()
        return self

    def until_step(self, step: int) -> Run:
        """Waits until this step is logged."""
        file = self.workdir / "metrics.jsonl"
        return self.until(lambda: file.exists() and file.read_bytes().count(b"\n") >= step)

    def until_saved(self) -> Run:
        """Waits until a checkpoint is whole: it is written while training goes on, then gets its name."""
        folder = self.workdir / "checkpoints"
        return self.until(lambda: any(path.name.isdigit() for path in folder.glob("*")))

    def until(self, happened: Callable[[], bool]) -> Run:
        """Waits; fails with what was said where a process ends before."""
        while not happened():
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]

    def examples(self) -> dict[int, dict[int, int]]:
        """Batch number → row of the global batch → example, of all processes; no two disagree on a row."""
        found: dict[int, dict[int, int]] = {}
        for file in self.records:
            for line in map(json.loads, file.read_text().splitlines()):
                rows = found.setdefault(line["batch"], {})
                for row, item in line["rows"]:
                    assert rows.setdefault(row, item) == item
        return found


def assert_close(metrics: list[dict], expected: list[dict]) -> None:
    """Every loss of every step to 1e-5."""
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    for line, other in zip(metrics, expected, strict=True):
        losses = [name for name in other if name.startswith("loss/")]
        assert losses
        for name in losses:
            assert abs(line[name] - other[name]) <= 1e-5 * max(1, abs(other[name])), (line["step"], name)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_as_one_and_restart_as_any_number(data_dir, tmp_path, count):
    """As one process with as many devices; killed after a checkpoint, continued by 1, 2 and 4 processes."""
    alone = Run(data_dir, tmp_path / "alone", 1, 2 * count).ends_well()
    together = Run(data_dir, tmp_path / "together", count, 2).ends_well()
    assert_close(together.metrics(), alone.metrics())
    assert together.examples() == alone.examples()
    assert set(alone.examples()) == set(range(1, STEPS + 1))
    assert all(set(rows) == set(range(16)) for rows in alone.examples().values())
    results = [json.loads((run.workdir / "results.json").read_text()) for run in (alone, together)]
    assert results[0].keys() == results[1].keys()
    assert all(results[1][name] == pytest.approx(value, abs=1e-5) for name, value in results[0].items())

    killed = Run(data_dir, tmp_path / "killed", count, 2).until_step(5).until_saved()
    killed.kill()
    saved = Checkpoints(killed.workdir / "checkpoints").latest()
    assert saved is not None and saved >= 4
    before = {batch: rows for batch, rows in killed.examples().items() if batch <= saved}
    assert before == {batch: rows for batch, rows in alone.examples().items() if batch <= saved}
    for processes in (1, 2, 4):
        workdir = tmp_path / f"continued_by_{processes}"
        shutil.copytree(killed.workdir, workdir)
        run = Run(data_dir, workdir, processes, 2 * count if processes == 1 else 2).ends_well()
        done = {batch: rows for batch, rows in alone.examples().items() if batch > saved}
        assert run.examples() == done  # the examples of the steps still to do: none lost, none repeated
        if processes == count:
            assert run.metrics() == together.metrics()  # bit for bit
        else:
            assert_close(run.metrics(), alone.metrics())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_saves_the_same_step_everywhere(data_dir, tmp_path, number):
    steps = ("--config.train.steps=5000", "--config.train.checkpoint_every=5000")
    run = Run(data_dir, tmp_path / "run", 2, 2, *steps).until_step(3)
    run.processes[1].send_signal(number)
    run.ends_well()
    assert Checkpoints(run.workdir / "checkpoints").latest() == run.metrics()[-1]["step"] < 5000


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_with_an_error(data_dir, tmp_path, victim):
    options = ("--config.train.steps=5000", "--config.distributed.heartbeat_timeout=20")
    run = Run(data_dir, tmp_path / "run", 2, 2, *options).until_step(3)
    run.processes[victim].kill()
    survivor = run.processes[1 - victim]
    assert survivor.wait(60) not in (0, None)  # well within three time-outs, however busy the machine
    said = run.logs[1 - victim].read_text()
    assert "most likely because another process died" in said or "most likely indicates that another task died" in said
