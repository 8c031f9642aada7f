"""What completion adds, at toy size: no completion, global, global and local; the other objectives are always on.

    python benchmarks/ablation.py --checkpoint=runs/quickstart --out=runs/ablation

Every arm and seed continues from one checkpoint of contrastive, matching and masked-language training, for the same
number of steps, and differs in the weights of completion alone. That checkpoint is the newest one that the quickstart
kept from before completion began, trained on for `--before` steps without completion. A seed decides the order of the
examples, all masks, and the initial head of the downstream task; what the arms start from is the same for all seeds.

Every run is evaluated zero-shot on 200 held-out scenes, then fine-tuned for visual questions. Finished runs are kept,
interrupted ones go on; `--arms` and `--seeds` make some of the runs, the table shows all that are there.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPLETION = ("global_vision", "global_text", "local_vision", "local_text")
START_SEED = 1000  # of the shared steps, so that no arm sees their examples again in the same order
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
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads(results.read_text())


def pretrain(workdir: Path, options: Namespace, arm: str, seed: int, steps: int, start: Path) -> dict[str, float]:
    """Pre-training on scenes with the quickstart's settings, every objective of the arm from the first step."""
    more: dict[str, object] = {f"objectives.{name}.weight": 0.0 for name in ARMS[arm]}
    for name in ("matching", "masked_language", *COMPLETION):
        more |= {f"objectives.{name}.start": 0, f"objectives.{name}.ramp": 0}
    return run(
        workdir,
        "configs/quickstart.py",
        **{"data.dir": options.data, "data.videos.share": 0.0, "init.checkpoint": start, "seed": seed},
        **{"train.steps": steps, "optimizer.learning_rate": options.learning_rate},
        **more,
    )


def before_completion(quickstart: Path, target: Path) -> Path:
    """A folder with the newest checkpoint of a run from before completion began, as `init.checkpoint` takes it.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    if target.exists():
        return target
    config = json.loads((quickstart / "config.json").read_text())
    begin = min(config["objectives"][name]["start"] for name in COMPLETION)
    steps = [int(folder.name) for folder in quickstart.glob("checkpoints/*") if folder.name.isdigit()]
    earlier = [step for step in steps if step <= begin]
    if not earlier:
        raise FileNotFoundError(
            f"{quickstart} holds the checkpoints {sorted(steps)}, but completion began at step {begin}: "
            "train it with --config.train.keep_latest=9"
        )
    shutil.copytree(quickstart / "checkpoints" / str(max(earlier)), target / "checkpoints" / str(max(earlier)))
    shutil.copy(quickstart / "config.json", target)
    return target


def one_run(options: Namespace, arm: str, seed: int) -> dict[str, float]:
    """Pre-training of an arm with a seed, then fine-tuning; their results together."""
    workdir = options.out / f"{arm}_{seed}"
    found = pretrain(workdir, options, arm, seed, options.steps, options.out / "start")
    answers = run(
        options.out / f"{arm}_{seed}_vqa",
        "configs/vqa.py:toy",
        **{"data.dir": options.data, "init.checkpoint": workdir, "seed": seed},
        **{"train.steps": options.finetune_steps, "evaluate.every": 0, "evaluate.best": False},
    )
    return found | answers


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
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart"), help="the quickstart's run")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--before", type=int, default=600, help="steps without completion that all arms share")
    parser.add_argument("--steps", type=int, default=300, help="of every arm")
    parser.add_argument("--finetune_steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of pre-training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    return parser.parse_args(argv)


def main() -> None:
    """Makes the runs that are missing, and prints the table of all."""
    options = parse()
    for place in ("checkpoint", "out", "data"):
        setattr(options, place, getattr(options, place).absolute())
    kept = before_completion(options.checkpoint, options.out / "before_completion")
    pretrain(options.out / "start", options, "none", START_SEED, options.before, kept)
    file = options.out / "ablation.json"
    results = json.loads(file.read_text()) if file.exists() else {arm: {} for arm in ARMS}
    for seed in options.seeds:
        for arm in options.arms:
            results[arm][str(seed)] = one_run(options, arm, seed)
            file.write_text(json.dumps(results, indent=1))
    print(table({arm: by_seed for arm, by_seed in results.items() if by_seed}))


if __name__ == "__main__":
    main()
