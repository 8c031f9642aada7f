"""What completion adds, at toy size: no completion, global, global and local; the other objectives are always on.

    python benchmarks/ablation.py --data=data --out=runs/ablation

First the quickstart's network is trained on scenes without completion (`--before` steps; the contrastive objective
joins in after 50 % of them, matching after 60 %). Every arm and seed continues from that checkpoint for the same number
of steps, and arms differ in the weights of completion alone, which are the quickstart's. A seed decides the order of
the examples, all masks, and the initial head of the downstream task; all seeds start from the same checkpoint.

Every run is evaluated zero-shot on 200 held-out scenes, then fine-tuned for visual questions. Finished runs are kept,
interrupted ones go on; `--arms` and `--seeds` make some of the runs, the table shows all that are there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
LATER = {"contrastive": 5, "matching": 6}  # after how many tenths of the common run they begin
COMPLETION = ("global_vision", "global_text", "local_vision", "local_text")
START_SEED = 1000  # so that no arm sees the examples of the shared steps again in the same order
ARMS = {"none": COMPLETION, "global": COMPLETION[2:], "global_local": ()}  # objectives that are off
METRICS = {
    "retrieval, contrastive": "retrieval/contrastive/mean_recall",
    "retrieval, re-scored": "retrieval/mean_recall",
    "matching": "matching/accuracy",
    "masked language": "masked_language/accuracy",
    "questions (fine-tuned)": "vqa/score",
}


def run(workdir: Path, config: str, **options: object) -> dict[str, float]:
    """The results of a run, which is made unless it is there."""
    results = workdir / "results.json"
    if not results.exists():
        command = [sys.executable, "-m", "scl_jax.main", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.{name}={value}" for name, value in options.items()]
        print(" ".join(command[1:]), flush=True)
        if (
            subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
            or not results.exists()
        ):
            sys.exit(f"error: {workdir} did not finish; the same command goes on from its last checkpoint")
    return json.loads(results.read_text())


def pretrain(workdir: Path, options: Namespace, off: Sequence[str], **more: object) -> dict[str, float]:
    """Pre-training on scenes with the quickstart's settings, without the objectives that are off."""
    starts = {f"objectives.{name}.{key}": 0 for name in COMPLETION for key in ("start", "ramp")}
    weights = {f"objectives.{name}.weight": 0.0 for name in off}
    return run(
        workdir,
        "configs/quickstart.py",
        **{"data.dir": options.data, "data.videos.share": 0.0},
        **(starts | weights | more),
    )


def common_start(options: Namespace) -> Path:
    """The run that every arm continues: masked language, then contrastive, then matching, from random weights."""
    workdir = options.out / "start"
    begin = {f"objectives.{name}.start": share * options.before // 10 for name, share in LATER.items()}
    pretrain(workdir, options, COMPLETION, **{"seed": START_SEED, "train.steps": options.before}, **begin)
    return workdir


def one_run(options: Namespace, arm: str, seed: int) -> dict[str, float]:
    """Pre-training of an arm with a seed, then fine-tuning; their results together."""
    workdir = options.out / f"{arm}_{seed}"
    at_once = {f"objectives.{name}.{key}": 0 for name in LATER for key in ("start", "ramp")}
    continued = {"init.checkpoint": options.out / "start", "seed": seed, "train.steps": options.steps}
    size = {"data.images.batch_size": options.batch_size, "optimizer.learning_rate": options.learning_rate}
    found = pretrain(workdir, options, ARMS[arm], **at_once, **continued, **size)
    answers = run(
        options.out / f"{arm}_{seed}_vqa",
        "configs/vqa.py:toy",
        **{"data.dir": options.data, "init.checkpoint": workdir, "seed": seed},
        **{"train.steps": options.finetune_steps, "evaluate.every": 0, "evaluate.best": False},
    )
    return found | answers


def collect(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """The results of all finished runs, by arm and seed."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for arm in ARMS:
        for answers in sorted(folder.glob(f"{arm}_[0-9]*_vqa/results.json")):
            before = answers.parent.with_name(answers.parent.name.removesuffix("_vqa"))
            seed = before.name.removeprefix(f"{arm}_")
            found = [json.loads(file.read_text()) for file in (before / "results.json", answers)]
            results.setdefault(arm, {})[seed] = found[0] | found[1]
    return results


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Mean ± sample standard deviation over seeds, in per cent; `results` by arm and seed."""
    lines = ["| arm | seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for arm, by_seed in results.items():
        cells = []
        for metric in METRICS.values():
            values = [100 * found[metric] for found in by_seed.values()]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {arm} | {len(by_seed)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--before", type=int, default=1000, help="steps without completion that all arms share")
    parser.add_argument("--steps", type=int, default=200, help="of every arm")
    parser.add_argument("--batch_size", type=int, default=32, help="of every arm")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of every arm")
    parser.add_argument("--finetune_steps", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    return parser.parse_args(argv)


def main() -> None:
    """Makes the runs that are missing, and prints the table of all."""
    options = parse()
    options.out, options.data = options.out.absolute(), options.data.absolute()
    common_start(options)
    for seed in options.seeds:
        for arm in options.arms:
            one_run(options, arm, seed)
    results = collect(options.out)
    (options.out / "ablation.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
