"""SIGKILL at random moments of one training run: `python -m tests.faults.kills [--kills=50] [--steps=1000] [--seed=0]`.

The run saves every few steps. It is killed while it starts, restores, steps and saves, and started again each time; its
last checkpoint and its files are compared with those of a run that nobody disturbed. Exit status 0: equal to the bit.

A process is forked from one that has imported the program and done nothing else, so that a restart takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests import toy_run
from tests.faults import runs

PHASES = ("starting", "restoring", "stepping", "saving")
# of every ten kills: what they wait for
AIMS = ("saving",) * 4 + ("stepping",) * 3 + ("restoring",) * 2 + ("starting",)
DELAYS = {"starting": 1.0, "restoring": 0.08, "stepping": 0.15, "saving": 0.1}  # seconds after that, at most


class Life:
    """One process of the run, forked; `marks` is a file in which it says what it is doing."""

    def __init__(self, arguments: list[str], marks: Path, log: Path):
        self.marks, self.log = marks, log
        marks.write_text("")
        self.pid = os.fork()
        if self.pid == 0:
            _live(arguments, marks, log)

    def said(self) -> list[str]:
        """The marks so far."""
        return self.marks.read_text().split("\n")[:-1]

    def over(self) -> int | None:
        """The exit status, negative for a signal; None while it lives."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def until(self, condition: Callable[[list[str]], bool]) -> int | None:
        """Waits for the marks to be so, or the end; the exit status, if it came first."""
        while not condition(self.said()):
            status = self.over()
            if status is not None:
                return status
            time.sleep(0.001)
        return None

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _live(arguments: list[str], marks: Path, log: Path) -> None:
    """The program, in a forked process, which says what it is doing; never returns."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    marking = os.open(marks, os.O_WRONLY | os.O_APPEND)

    def marked(owner: type, name: str, begin: str, end: str) -> None:
        method = getattr(owner, name)

        def call(self, *arguments, **options):
            os.write(marking, f"{begin}\n".encode())
            result = method(self, *arguments, **options)
            if end:
                os.write(marking, f"{end}\n".encode())
            return result

        setattr(owner, name, call)

    from absl import app

    from scl_jax import main
    from scl_jax.training.checkpoint import Checkpoints
    from scl_jax.training.nonfinite import Guard

    marked(Checkpoints, "restore", "restoring", "restored")
    marked(Checkpoints, "save", "saving", "save began")
    marked(Guard, "add", "step", "")
    status = 1
    try:
        sys.argv = ["main", *arguments]  # where config_flags looks for overrides
        app.run(main.main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if status:
            print(end.code, flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)  # pytest, a harness: nothing of the parent's is to be cleaned up here


def aimed(aim: str, rng: random.Random) -> Callable[[list[str]], bool]:
    """What the marks look like when it is time."""
    number = rng.randint(1, 4)  # the first save of a life, or a later one
    return {
        "starting": lambda marks: True,
        "restoring": lambda marks: "restoring" in marks,
        "stepping": lambda marks: marks.count("step") > number,
        "saving": lambda marks: marks.count("saving") >= number,
    }[aim]


def phase(marks: list[str], workdir: Path) -> str:
    """What a process was doing when it died, by its marks and by what it left on the disk."""
    unfinished = [path for path in workdir.glob("checkpoints/*") if not path.name.isdigit()]
    if marks and (marks[-1] == "saving" or (unfinished and "saving" in marks)):
        return "saving"
    if "step" in marks:
        return "stepping"
    return "restoring" if "restoring" in marks else "starting"


def disturb(arguments: list[str], workdir: Path, kills: int, seed: int) -> tuple[Counter, int, int]:
    """Runs to the end with so many kills: (kills by phase, steps lost, damaged folders met)."""
    rng, phases, lost, damaged = random.Random(seed), Counter(), 0, 0
    from scl_jax.training.checkpoint import damage

    aims = [AIMS[place % len(AIMS)] for place in range(kills)]
    rng.shuffle(aims)
    for number, aim in enumerate(aims):
        if aim == "restoring" and not runs.saved(workdir):
            aim = "stepping"
        life = Life(arguments, workdir.parent / "marks", workdir.parent / "disturbed.log")
        status = life.until(aimed(aim, rng))
        if status is not None:
            raise SystemExit(f"ended with {status} after {number} kills: {life.log.read_text()[-2000:]}")
        time.sleep(rng.uniform(0, DELAYS[aim]))
        life.kill()
        marks, steps = life.said(), runs.saved(workdir)
        found = phase(marks, workdir)
        phases[found] += 1
        begun = int(json.loads((workdir.parent / "begun").read_text())) if (workdir.parent / "begun").exists() else 0
        done, kept = begun + marks.count("step"), max(steps, default=0)
        lost += max(0, done - kept) if "step" in marks else 0
        damaged += sum(bool(damage(workdir / "checkpoints" / str(step))) for step in steps)
        (workdir.parent / "begun").write_text(str(kept))
        print(f"kill {number + 1:3d}: while {found:9s} newest checkpoint {kept}", flush=True)
    life = Life(arguments, workdir.parent / "marks", workdir.parent / "disturbed.log")
    status = life.until(lambda marks: False)
    if status:
        raise SystemExit(f"ended with {status}: {life.log.read_text()[-2000:]}")
    return phases, lost, damaged


def compare(one: Path, other: Path, steps: int) -> list[str]:
    """What differs between two runs: arrays of the last checkpoint, and files."""
    found = runs.differing(one, other, steps)
    if (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    timeless = [{name: x for name, x in result.items() if "seconds" not in name} for result in results]
    return found + ["results.json"] * (timeless[0] != timeless[1])


def main() -> None:
    """Runs the harness."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1000, help="of the run; it must not end before the last kill")
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    options = parser.parse_args()
    os.environ.update(runs.environment())
    import scl_jax.main  # noqa: F401  before the forks: nothing is imported twice, no device touched
    import scl_jax.session  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        data = folder / "data"
        if os.fork() == 0:  # the library of shards keeps threads, which do not live on in a fork
            toy_run.prepare(data)
            os._exit(0)
        os.wait()
        schedule = {"train.steps": options.steps, "train.checkpoint_every": options.every, "log.every": 1}
        whole, killed = folder / "undisturbed", folder / "disturbed"
        life = Life(runs.flags(data, whole, **schedule), folder / "marks", folder / "undisturbed.log")
        if life.until(lambda marks: False):
            raise SystemExit(life.log.read_text()[-2000:])
        print(f"undisturbed: {options.steps} steps in {time.monotonic() - begin:.0f} s", flush=True)
        phases, lost, damaged = disturb(runs.flags(data, killed, **schedule), killed, options.kills, options.seed)
        differs = compare(whole, killed, options.steps)
        print(
            f"kills {phases.total()}, restarts {phases.total()}; while "
            + ", ".join(f"{name} {phases[name]}" for name in PHASES)
            + f"; steps lost and done again {lost}; half-deleted folders met {damaged}; "
            f"{time.monotonic() - begin:.0f} s in all"
        )
        same = "parameters, optimizer, metrics and results are equal to the bit"
        print(f"DIFFERENT: {', '.join(differs)}" if differs else same)
        sys.exit(bool(differs))


if __name__ == "__main__":
    main()
