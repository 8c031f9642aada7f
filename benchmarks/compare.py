"""Ours against the PyTorch baseline, step by step in turn, each in a process of its own.

Both processes make the same network and batch, compile and warm up; then single steps alternate, so that whatever else
the machine does hits both alike. Prints medians, the ratio, and the peak memory of each process (CPU) or device (GPU).

    python benchmarks/compare.py --config=configs/pretrain_image.py --batch=2 --dtype=float32 --threads=2 --repeats=3
    python benchmarks/compare.py --config=configs/pretrain_video.py --stream=videos --batch=1 --one_at_a_time --rounds=2
    python benchmarks/compare.py --debug --batch=4      # toy size; torch_compiled takes minutes to compile on a CPU

What a change brings, where a machine is noisy: steps of this checkout and of another one in turn. Few layers of full
width, so that both fit into memory.

    git worktree add ../before HEAD~1
    python benchmarks/compare.py --sides ours before --before=../before --layers 4 2 4 --unroll=12 --repeats=12
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OURS = ("ours", "before")  # of this checkout and of another one
SIDES = (*OURS, "torch", "torch_compiled")
PREFIX = "@@"  # marks a worker's answers among whatever libraries print


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pretrain_image.py")
    parser.add_argument("--stream", default="images", choices=("images", "videos"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"), help="of ours")
    parser.add_argument("--unroll", type=int, default=0, help="layers a turn of ours' loops; 0: model.unroll's default")
    parser.add_argument("--dropout", type=float, default=0.1, help="of both, 0.1 is the paper's")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores of either side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=["ours", "torch"], choices=SIDES)
    parser.add_argument("--before", default="", help="the other checkout's folder, for the side of that name")
    parser.add_argument("--layers", type=int, nargs=3, metavar=("VISION", "TEXT", "FUSION"), help="fewer layers")
    parser.add_argument("--one_at_a_time", action="store_true", help="one after the other, for large batches")
    parser.add_argument("--rounds", type=int, default=1, help="with new processes: sides one at a time alternate")
    parser.add_argument("--debug", action="store_true", help="a tiny network")
    parser.add_argument("--json", default="")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if "before" in options.sides and not options.worker and not (Path(options.before or ".none") / "scl_jax").is_dir():
        parser.error(f"--before must name another checkout of this repository, not {options.before!r}")
    return options


# ---- one side, in its own process ----


def load_config(options: argparse.Namespace) -> Any:
    """The config of either side, complete."""
    from scl_jax.benchmark.workload import complete, read_config

    config = read_config(ROOT / options.config)
    config.debug = options.debug
    config.model.update(remat=options.remat, unroll=options.unroll)
    config.model.update(dropout=options.dropout, attention_dropout=options.dropout)
    for part, layers in zip(("vision", "text", "fusion"), options.layers or (), strict=False):
        config.model[part].layers = layers
    config = complete(config, options.stream, options.batch)
    config.model.dtype = options.dtype
    return config


def make_side(options: argparse.Namespace) -> Any:
    """An object with `run()`, which makes one step and waits for it."""
    from scl_jax.benchmark import workload

    if options.worker in OURS and importlib.util.find_spec("scl_jax.host_memory"):  # an older checkout has none
        from scl_jax.host_memory import keep_freed

        keep_freed()
    config = load_config(options)
    if options.worker in OURS:
        return workload.Training(config, options.stream)
    import torch
    import torch_baseline

    torch.set_num_threads(options.threads)
    arrays = workload.random_arrays(config, options.stream, options.batch)
    compiled = options.worker == "torch_compiled"
    return torch_baseline.Training(config, options.stream, arrays, options.device, options.dtype, compiled)


def peak_memory(options: argparse.Namespace) -> int:
    """Peak bytes of the GPU, or of this process."""
    if options.device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if options.worker in OURS:
        from scl_jax.benchmark.step import peak_memory as ours

        return ours()
    import torch

    return torch.cuda.max_memory_allocated()


def work(options: argparse.Namespace) -> None:
    """Answers the lines of standard input: "run" with seconds and loss, "end" with the peak memory."""
    if options.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    start = time.perf_counter()
    side = make_side(options)
    for _ in range(options.warmup):
        side.run()
    answer({"ready_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        if line.strip() == "end":
            break
        start = time.perf_counter()
        metrics = side.run()
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "loss": float(metrics["loss/total"])})
    answer({"peak_bytes": peak_memory(options)})


def answer(message: dict[str, float]) -> None:
    """One line for the process that started this one."""
    print(PREFIX + json.dumps(message), flush=True)


# ---- the process that compares ----


class Side:
    """A worker process."""

    def __init__(self, name: str, argv: Sequence[str], device: str, root: Path):
        environment = os.environ | {
            "JAX_PLATFORMS": device if name in OURS else "cpu",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the sides share the GPU
            # memory of both sides in large pages: a step of either allocates gigabytes; ours keeps them, as in a run
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
            "PYTHONPATH": os.pathsep.join([str(root), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, str(Path(__file__)), *argv, f"--worker={name}"]
        self.name = name
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.seconds: list[float] = []
        self.ready_seconds = self.read()["ready_seconds"]

    def read(self) -> dict[str, float]:
        """The next answer.

        Raises:
            RuntimeError: the worker ended without one; what it printed stands above.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(PREFIX):
                return json.loads(line.removeprefix(PREFIX))
        raise RuntimeError(f"{self.name} ended with code {self.process.wait()}; a batch too large for the memory?")

    def ask(self, what: str) -> dict[str, float]:
        """Sends a line, returns the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.read()

    def step(self) -> None:
        """Times one step."""
        result = self.ask("run")
        self.seconds.append(result["seconds"])

    def end(self) -> dict[str, Any]:
        """Ends the process; what it measured."""
        peak = self.ask("end")["peak_bytes"]
        self.process.wait()
        return {"seconds": self.seconds, "peak_bytes": peak, "ready_seconds": self.ready_seconds}


def run_round(names: Sequence[str], options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Steps of these sides in turn, side by side in memory; one that fails has "error" instead."""
    results: dict[str, Any] = {}
    sides = []
    for name in names:
        try:
            root = Path(options.before).resolve() if name == "before" else ROOT
            sides.append(Side(name, argv, options.device, root))
        except RuntimeError as error:
            results[name] = {"error": str(error)}
    for number in range(options.repeats):
        for side in sides if number % 2 == 0 else reversed(sides):  # neither always follows the other
            side.step()
    return results | {side.name: side.end() for side in sides}


def summarize(rounds: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """One side's result of all rounds: every step's seconds and their median, the highest memory."""
    failed = [r for r in rounds if "error" in r]
    if failed:
        return failed[0]
    seconds = [s for r in rounds for s in r["seconds"]]
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median_seconds": median,
        "samples_per_second": batch / median,
        "peak_bytes": max(r["peak_bytes"] for r in rounds),
        "ready_seconds": rounds[0]["ready_seconds"],
    }


def compare(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Results of every side."""
    groups = [[name] for name in options.sides] if options.one_at_a_time else [options.sides]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.sides}
    for _ in range(options.rounds):
        for names in groups:
            for name, result in run_round(names, options, argv).items():
                rounds[name].append(result)
                print(f"{name}: {result}", flush=True)  # stays where a later side takes too long
    return {name: summarize(results, options.batch) for name, results in rounds.items()}


def main(argv: Sequence[str]) -> None:
    """Runs the comparison or, inside of it, one side."""
    options = parse(argv)
    if options.worker:
        work(options)
        return
    results = compare(options, argv)
    print(f"{options.config} {options.stream} batch {options.batch} {options.dtype} on {options.device}")
    for name, r in results.items():
        if "error" in r:
            print(f"  {name:15s} {r['error']}")
            continue
        seconds = " ".join(f"{s:.3f}" for s in r["seconds"])
        print(
            f"  {name:15s} {r['median_seconds']:.3f} s/step, {r['samples_per_second']:.3f} samples/s, "
            f"peak {r['peak_bytes'] / 2**30:.2f} GiB, ready after {r['ready_seconds']:.0f} s ({seconds})"
        )
    ours = results.get("ours", {})
    for name, r in results.items():
        if name != "ours" and "error" not in r and "median_seconds" in ours:
            ratio, memory = r["median_seconds"] / ours["median_seconds"], ours["peak_bytes"] / r["peak_bytes"]
            print(f"  ours is {ratio:.2f} times as fast as {name}, with {memory:.2f} of its peak memory")
            if not options.one_at_a_time:
                shares = [mine / other for mine, other in zip(ours["seconds"], r["seconds"], strict=True)]
                print(f"  ours takes {statistics.median(shares):.3f} of the time of {name}, the median of step by step")
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps({"options": vars(options), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
