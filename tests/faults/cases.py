"""Every fault once, on the real program: `python -m tests.faults.cases [names]`, a few minutes. Prints what it says.

Exit status 0: every case went as docs/reliability.md says. A full disk and a read-only one are small file systems in
memory, which need the right to mount; without it these two cases say that they were not tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import toy_run
from tests.faults import runs

USUAL = r"\s*(retrieval/|matching/|masked_language/|speed/|results|images:|step +\d+/|WARNING:|$)"  # said in any run
STEPS = {"train.steps": 12, "train.checkpoint_every": 3, "train.keep_latest": 4, "log.every": 1}


# two objectives: a replay compiles each on its own
FEW = {
    f"objectives.{name}.weight": 0.0
    for name in ("contrastive", "masked_language", "global_vision", "global_text", "local_vision")
}


class NotTriedError(Exception):
    """The machine does not let this case be tried."""


class Cases:
    """The cases; each returns what the program said. `whole` is an undisturbed run."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, toy_run.prepare(folder / "data")
        self.whole = folder / "whole"
        self.run(self.whole, **STEPS).ends()

    def run(self, workdir: Path, program: tuple[str, ...] = ("-m", "scl_jax.main"), **changes) -> runs.Run:
        """Starts the program."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        return runs.Run(runs.flags(self.data, workdir, **({"log.console": True} | changes)), log, program)

    def same_as_whole(self, workdir: Path) -> None:
        """AssertionError: another end than that of the undisturbed run."""
        assert runs.differing(self.whole, workdir, 12) == []
        assert (workdir / "metrics.jsonl").read_bytes() == (self.whole / "metrics.jsonl").read_bytes()

    def sigterm(self) -> str:
        """SIGTERM: saves the step it is at, and ends with 0."""
        workdir = self.folder / "sigterm"
        long = STEPS | {"train.steps": 100_000, "train.checkpoint_every": 100_000}
        run = self.run(workdir, **long)
        run.until(lambda: runs.logged(workdir) >= 3)
        run.process.send_signal(signal.SIGTERM)
        said = run.ends(0)
        assert runs.saved(workdir) == [runs.metrics(workdir)[-1]["step"]]
        return said

    def second_process(self) -> str:
        """A second process in the same work directory is refused, the first goes on."""
        workdir = self.folder / "second"
        first = self.run(workdir, **(STEPS | {"train.steps": 100_000}))
        first.until(lambda: runs.logged(workdir) >= 1)
        said = self.run(workdir, **(STEPS | {"train.steps": 100_000})).ends(1)
        assert f"in use by process {first.process.pid} on" in said
        before = runs.logged(workdir)
        first.until(lambda: runs.logged(workdir) > before)
        first.kill()
        assert runs.logged(workdir) > 0
        return said

    def after_a_kill(self) -> str:
        """What SIGKILL leaves: no lock, half a line of metrics, half a checkpoint; the same end as without it."""
        workdir = self.folder / "killed"
        run = self.run(workdir, **STEPS)
        run.until(lambda: runs.logged(workdir) >= 5)
        run.kill()
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "loss/im')
        (workdir / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
        said = self.run(workdir, **STEPS).ends()
        self.same_as_whole(workdir)
        return said

    def damaged_checkpoint(self) -> str:
        """The newest checkpoint cut short: set aside, the one before continued, the same end."""
        workdir = self.folder / "damaged"
        shutil.copytree(self.whole, workdir)
        data = max((workdir / "checkpoints/12/state").rglob("*"), key=lambda x: x.is_file() and x.stat().st_size)
        os.truncate(data, data.stat().st_size // 2)
        said = self.run(workdir, **STEPS).ends()
        assert "checkpoint 12 cannot be read" in said and "continuing from step 9" in said
        self.same_as_whole(workdir)
        return said

    def full_disk(self) -> str:
        """The disk is full during a save: said, earlier checkpoints whole; with room again the same end."""
        size = sum(path.stat().st_blocks * 512 for path in (self.whole / "checkpoints/3").rglob("*"))
        with small_disk(self.folder / "disk", kib=int(2.6 * size / 1024) + 64) as disk:
            workdir = disk / "run"
            said = self.run(workdir, **STEPS).ends(1)
            assert "the disk is full" in said, said
            kept = runs.saved(workdir)
            assert kept and all(runs.differing(self.whole, workdir, step) == [] for step in kept)
            mount("-o", "remount,size=1g", str(disk))
            said_then = self.run(workdir, **STEPS).ends()
            assert f"continuing from step {kept[-1]}" in said_then
            self.same_as_whole(workdir)
        return said

    def read_only(self) -> str:
        """A work directory that cannot be written: said before anything is compiled."""
        with small_disk(self.folder / "read_only", kib=1024) as disk:
            mount("-o", "remount,ro", str(disk))
            begin = time.monotonic()
            said = self.run(disk / "run", **STEPS).ends(1)
            assert "cannot write to the work directory" in said and "Read-only file system" in said
            return f"{said.strip()} [after {time.monotonic() - begin:.0f} s]"

    def not_finite(self) -> str:
        """NaN at steps 4 and 7: skipped, counted, kept, replayed."""
        workdir = self.folder / "nan"
        said = self.run(workdir, ("-m", "tests.faults.poison", "4,7", "matching", "loss"), **STEPS, **FEW).ends()
        assert [line["skipped_updates"] for line in runs.metrics(workdir)] == [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]
        log = self.folder / "replay.log"
        program = ("-m", "tests.faults.poison", "4,7", "matching", "loss", "replay")
        return said + "── replay\n" + runs.Run([str(workdir), "--step=4"], log, program).ends(3)

    def not_finite_in_a_row(self) -> str:
        """Three times in a row, and only in the gradient: the run ends and names the objective."""
        workdir = self.folder / "row"
        program = ("-m", "tests.faults.poison", "5,6,7", "local_text", "gradient")
        said = self.run(workdir, program, **STEPS, **FEW, **{"train.max_nonfinite_in_row": 3}).ends(1)
        assert "The gradient that is not finite is that of local_text" in said
        return said

    def config(self) -> str:
        """Nonsense in many options: one report, before anything is compiled."""
        changes = {"train.steps": 0, "optimizer.b2": 1.5, "model.dropout": -1.0, "data.images.batch_size": 10}
        begin = time.monotonic()
        said = self.run(self.folder / "never", **(STEPS | changes)).ends(1)
        assert "the config has 4 problem(s)" in said and not (self.folder / "never").exists()
        return f"{said.strip()} [after {time.monotonic() - begin:.0f} s]"


@contextmanager
def small_disk(at: Path, kib: int) -> Iterator[Path]:
    """A file system of this size in memory."""
    at.mkdir()
    mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(at))
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def mount(*arguments: str) -> None:
    """mount(8)."""
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotTriedError(f"mount: {getattr(error, 'stderr', error)}") from error


def main() -> None:
    """Runs the cases."""
    every = [name for name, value in vars(Cases).items() if isinstance(value, Callable) and value.__doc__]
    every = [name for name in every if name not in ("__init__", "run", "same_as_whole")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", default=every, help=", ".join(every))
    options = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder))
        for name in options.names:
            case = getattr(cases, name)
            print(f"══ {name}: {case.__doc__}", flush=True)
            try:
                print("\n".join(f"   {line}" for line in case().splitlines() if not re.match(USUAL, line)), flush=True)
            except NotTriedError as reason:
                print(f"   NOT TRIED: {reason}")
            except AssertionError as error:
                failed.append(name)
                print(f"   FAILED: {error}", flush=True)
    print(json.dumps({"cases": len(options.names), "failed": failed}))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
