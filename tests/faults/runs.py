"""A very small run of the real program in a process of its own, for the harnesses: `python -m tests.faults.<name>`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import toy_run

# all seven objectives on images: steps of some ten milliseconds
SMALL = {"data.videos.share": 0.0, "data.images.batch_size": 8, "objectives.group_size": 4}
CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Of a run on the CPU whose restarts find their compiled step."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(toy_run.ROOT / ".pytest_cache/xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", CHEAP),
        "PYTHONPATH": str(toy_run.ROOT),
        **more,
    }


def flags(data_dir: Path, workdir: Path, **changes) -> list[str]:
    """Of `scl_jax.main`, the small run with options changed by dotted name."""
    config = [f"--config={toy_run.ROOT}/tests/toy_config.py:{data_dir}", f"--workdir={workdir}"]
    return [*config, *(f"--config.{name}={value}" for name, value in (SMALL | changes).items())]


class Run:
    """One process of the program; what it prints goes to a file."""

    def __init__(self, arguments: list[str], log: Path, program: tuple[str, ...] = ("-m", "scl_jax.main"), **options):
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=toy_run.ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                **({"env": environment()} | options),
            )

    def said(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    def ends(self, code: int = 0, timeout: float = 600) -> str:
        """Waits for its end; what it printed. AssertionError: another exit status."""
        found = self.process.wait(timeout)
        assert found == code, f"exit status {found}, not {code}:\n{self.said()[-3000:]}"
        return self.said()

    def until(self, condition, timeout: float = 300) -> None:
        """Waits until something is the case; AssertionError: the process ended, or it took too long."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said()[-3000:]}"
            assert time.monotonic() < end, f"nothing within {timeout} s:\n{self.said()[-3000:]}"
            time.sleep(0.002)

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def logged(workdir: Path) -> int:
    """Whole lines of metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir: Path) -> list[int]:
    """The steps of the checkpoints that are there."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())


def arrays(workdir: Path, step: int) -> dict:
    """Every array of a checkpoint's state, by path: parameters, optimizer, step."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    folder = workdir.absolute() / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def differing(one: Path, other: Path, step: int) -> list[str]:
    """The arrays of two runs' checkpoints of a step that are not equal to the bit."""
    first, second = arrays(one, step), arrays(other, step)
    assert first.keys() == second.keys() and len(first) > 50, len(first)
    return [path for path, x in first.items() if x.tobytes() != second[path].tobytes()]
