"""Feeds mutated files to everything that reads files of strangers, and counts what becomes of them.

    python tests/faults/fuzz.py --inputs=100000

Every input is either *accepted* (and what was read has the documented form) or *refused* (with the documented error).
Anything else is a finding: *wrong* (another error, or a result of another form), *crash* (the process died), *hang* (no
answer within `--limit` seconds). The inputs run in a process of their own, which is watched and, if need be, replaced.
Input k of a target is a function of (seed, target, k): a finding is repeated with --targets, --first and --inputs, and
its bytes lie in the folder that is named at the end. Exit status 1 where there is a finding.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PLACES = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
sys.path[:0] = PLACES
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PLACES), "JAX_PLATFORMS": "cpu"}

KINDS = ("accepted", "refused", "wrong", "crash", "hang")
_STATE = struct.Struct("<4q")  # next input, accepted, refused, wrong: shared with the worker, outlives it
_MEMORY = 4 * 2**30  # bytes of address space beyond what is mapped at the start


# ---- the worker ----


def work(target_name: str, seeds: Path, state_file: Path, findings: Path, end: int, seed: int) -> None:
    """Tries inputs from where the state stands up to `end`."""
    import fuzz_targets

    target = fuzz_targets.TARGETS[target_name](seeds)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY, mapped + _MEMORY))
    with state_file.open("r+b") as file:
        state = mmap.mmap(file.fileno(), _STATE.size)
    number, *counts = _STATE.unpack(state[:])
    while number < end:
        data = target.input(random.Random(f"{seed}/{target_name}/{number}"))
        try:
            counts[0 if target.check(data) else 1] += 1
        except Exception:
            counts[2] += 1
            save(findings, target_name, number, data, traceback.format_exc())
        number += 1
        state[:] = _STATE.pack(number, *counts)


def save(findings: Path, target: str, number: int, data: bytes, why: str) -> None:
    """Leaves an input and what it did."""
    findings.mkdir(parents=True, exist_ok=True)
    (findings / f"{target}-{number}.bin").write_bytes(data)
    (findings / f"{target}-{number}.txt").write_text(why)


# ---- the watcher ----


class Watch:
    """Runs the inputs of one target in workers, one after the other, and counts."""

    def __init__(self, target: str, scratch: Path, seed: int, limit: float):
        self._target, self._scratch, self._seed, self._limit = target, scratch, seed, limit
        self._state = scratch / f"{target}.state"
        self.findings = scratch / "findings"
        self.lost = {"crash": 0, "hang": 0}

    def run(self, first: int, count: int) -> dict[str, int]:
        """Tries `count` inputs and returns how many of each of KINDS there were."""
        self._state.write_bytes(_STATE.pack(first, 0, 0, 0))
        while self._read()[0] < first + count:
            ended = self._run_worker(first + count)
            if ended:
                self._note(ended)
        return dict(zip(KINDS, self._read()[1:], strict=False)) | self.lost

    def _read(self) -> tuple[int, ...]:
        return _STATE.unpack(self._state.read_bytes())

    def _run_worker(self, end: int) -> str:
        """Until all is done, "", or an input ended it: what kind of finding, and how."""
        arguments = [self._target, str(self._scratch), str(end), str(self._seed)]
        with (self._scratch / f"{self._target}.log").open("w+") as log:
            command = [sys.executable, __file__, "--worker", *arguments]
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self._scratch, env=ENVIRONMENT
            )
            number, since, patience = self._read()[0], time.monotonic(), 60.0  # of imports
            while process.poll() is None:
                time.sleep(0.02)
                if (now := self._read()[0]) != number:
                    number, since, patience = now, time.monotonic(), self._limit
                elif time.monotonic() - since > patience:
                    process.kill()
                    process.wait()
                    return "hang"
            log.seek(0)
            said = log.read()[-2000:]
        if process.returncode == 0:
            return ""
        if process.returncode > 0:
            raise RuntimeError(f"the fuzzer itself failed on {self._target}:\n{said}")
        return f"crash by signal {-process.returncode}\n{said}"

    def _note(self, ended: str) -> None:
        number, *counts = self._read()
        self.lost["hang" if ended == "hang" else "crash"] += 1
        import fuzz_targets

        target = fuzz_targets.TARGETS[self._target](self._scratch)
        data = target.input(random.Random(f"{self._seed}/{self._target}/{number}"))
        save(self.findings, self._target, number, data, ended)
        self._state.write_bytes(_STATE.pack(number + 1, *counts))


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for one input")
    parser.add_argument("--targets", default="", help="only these, separated by commas")
    arguments = parser.parse_args()
    import fuzz_targets

    shares = {name: target.share for name, target in fuzz_targets.TARGETS.items()}
    if arguments.targets:
        shares = {name: shares[name] for name in arguments.targets.split(",")}
    scratch = Path(tempfile.mkdtemp(prefix="scl-fuzz-"))
    command = [sys.executable, str(Path(__file__).with_name("fuzz_seeds.py")), str(scratch)]
    subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    start, totals = time.monotonic(), dict.fromkeys(KINDS, 0)
    print(f"{'target':<16}" + "".join(f"{kind:>10}" for kind in ("inputs", *KINDS, "seconds")))
    for name, share in shares.items():
        begin, count = time.monotonic(), -(-arguments.inputs * share // sum(shares.values()))
        watch = Watch(name, scratch, arguments.seed, arguments.limit)
        found = watch.run(arguments.first, count)
        totals = {kind: totals[kind] + found[kind] for kind in KINDS}
        numbers = (count, *(found[kind] for kind in KINDS), round(time.monotonic() - begin))
        print(f"{name:<16}" + "".join(f"{number:>10,}" for number in numbers), flush=True)
    seconds = round(time.monotonic() - start)
    print(f"{'all':<16}" + "".join(f"{n:>10,}" for n in (sum(totals.values()), *totals.values(), seconds)))
    failed = sum(totals[kind] for kind in ("wrong", "crash", "hang"))
    if failed:
        print(f"findings: {scratch / 'findings'}")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, folder, end, seed = sys.argv[2:]
        place = Path(folder)
        work(name, place, place / f"{name}.state", place / "findings", int(end), int(seed))
        sys.stdout.flush()
        os._exit(0)  # threads of libraries are not waited for
    sys.exit(main())
