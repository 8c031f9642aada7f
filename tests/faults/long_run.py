"""A long run at a very small size: `python -m tests.faults.long_run [--steps=20000]`, about ten minutes of one core.

With checkpoints and evaluations all along; prints memory, open files and compilations at step 1,000 and at the end.
Exit status 0: memory within 2 %, the same open files, no compilation after step 1,000, checkpoints pruned.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from tests import toy_run
from tests.faults import runs

FIRST = 1000  # step of the first measurement
TINY = {
    "data.videos.share": 0.0,
    "data.images.batch_size": 4,
    "data.images.image_size": 32,  # four patches, of which two are dropped and one is replaced
    "objectives.global_vision.drop_ratio": 0.5,
    "data.text_length": 10,
    "objectives.group_size": 4,
    "evaluate.batch_size": 16,
    "evaluate.max_items": 8,
    "evaluate.every": 500,
    "train.checkpoint_every": 250,
    "train.keep_latest": 2,
    "log.every": 50,
    "log.tensorboard": True,
    "log.console": True,
}


class Compilations:
    """Counts what XLA compiles or reads from its cache."""

    def __init__(self):
        import jax

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def measured(compilations: Compilations) -> dict[str, int]:
    """Resident memory in KiB that is in use, open files, threads, compilations of this process.

    What was freed is first given back to the system, so that the allocator's reserves do not count as memory in use.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory_kib": int(status["VmRSS"].split()[0]),
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "compilations": compilations.count,
    }


def run(folder: Path, steps: int) -> dict[int, dict[str, int]]:
    """Trains, and returns the measurements by step."""
    from scl_jax.session import Session
    from scl_jax.training.logging import RunLog

    compilations, found = Compilations(), {}
    status, begin = RunLog.status, time.monotonic()

    def watched(log: RunLog, step: int, metrics: Any = None) -> None:
        status(log, step, metrics)
        if step % FIRST == 0 or step == steps:
            found[step] = measured(compilations)
            print(f"{time.monotonic() - begin:6.0f} s  step {step}: {found[step]}", file=sys.stderr, flush=True)

    RunLog.status = watched
    data = toy_run.prepare(folder / "data")
    session = Session(toy_run.config(data, **TINY, **{"train.steps": steps}), folder / "run")
    session.report = lambda *_: None  # the end is not the matter here
    session.train()
    return found


def main() -> None:
    """Runs the harness."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    options = parser.parse_args()
    os.environ.update(runs.environment(XLA_FLAGS=os.environ.get("XLA_FLAGS", "")))  # few compilations, many steps
    flags.FLAGS.mark_as_parsed()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(folder, options.steps)
        first, last = found[FIRST], found[options.steps]
        growth = last["memory_kib"] / first["memory_kib"] - 1
        files = {path.name: path.stat().st_size for path in (folder / "run").iterdir() if path.is_file()}
        sizes = ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in sorted(files.items()) if size > 2**14)
        print(f"memory {first['memory_kib']} → {last['memory_kib']} KiB ({100 * growth:+.2f} %)")
        for name in ("open_files", "threads", "compilations"):
            print(f"{name.replace('_', ' ')} {first[name]} → {last[name]}")
        print(f"checkpoints {runs.saved(folder / 'run')}")
        print(f"files: {sizes}")
        same = all(first[name] == last[name] for name in ("open_files", "compilations"))
        sys.exit(not (same and abs(growth) <= 0.02 and len(runs.saved(folder / "run")) <= 4))


if __name__ == "__main__":
    main()
