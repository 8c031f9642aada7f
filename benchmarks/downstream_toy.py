"""Does pre-training help? Every task on the toy world, fine-tuned from a checkpoint and from random weights.

    bash launch/quickstart.sh  # the checkpoint; its tokenizer is kept
    python -m scl_jax.data.prepare --out=data --dataset=toy_world/questions,toy_world/statements,toy_world/entailment
    python benchmarks/downstream_toy.py --checkpoint=runs/quickstart --out=runs/downstream

Both runs of a task have the same config (`configs/<task>.py:toy`), seed, examples and steps; only `init.checkpoint`
differs. Finished runs are kept, interrupted ones go on. The table stands beside what needs no learning: always the
most common answer or class, the most common answer to questions that begin alike, and chance.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BEGINNING = 2  # words of a question that tell its kind: "what colour", "how many", "is there"


class Task(NamedTuple):
    """A task of the table: its config, its data set, and the metrics that are shown."""

    config: str
    dataset: str
    metrics: tuple[str, ...]


RECALLS = ("text_to_{0}/recall@1", "{0}_to_text/recall@1")
TASKS = {
    "vqa": Task("vqa", "toy_world/questions", ("vqa/score",)),
    "nlvr2": Task("nlvr2", "toy_world/statements", ("nlvr2/accuracy",)),
    "snli_ve": Task("snli_ve", "toy_world/entailment", ("entailment/accuracy",)),
    "image_retrieval": Task(
        "retrieval_f30k", "toy_world/images", tuple(f"retrieval/{name.format('image')}" for name in RECALLS)
    ),
    "video_retrieval": Task(
        "retrieval_msrvtt", "toy_world/videos", tuple(f"retrieval/video/{name.format('video')}" for name in RECALLS)
    ),
}


def finetune(name: str, options: Namespace, checkpoint: str) -> dict[str, float]:
    """The results of one run; `checkpoint` empty: from random weights."""
    workdir = options.out / (name if checkpoint else f"{name}_random")
    results = workdir / "results.json"
    if not results.exists():
        command = [
            *(sys.executable, "-m", "scl_jax.main", f"--config=configs/{TASKS[name].config}.py:toy"),
            *(f"--workdir={workdir}", f"--config.data.dir={options.data}", f"--config.init.checkpoint={checkpoint}"),
            *options.overrides,
        ]
        print(" ".join(command[1:]), flush=True)
        if (
            subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
            or not results.exists()
        ):
            sys.exit(f"error: {workdir} did not finish; the same command goes on from its last checkpoint")
    return json.loads(results.read_text())


def texts_with_answers(data: Path, dataset: str) -> Iterator[tuple[str, str]]:
    """Every text of the test split with its best answer or its label."""
    from scl_jax.data.builders import open_source

    source = open_source(dataset, "test", data)
    for index in range(len(source)):
        record = source[index]
        labels = record["labels"] if "labels" in record else record["answer_labels"]  # toy questions have one answer
        for text, label in zip(record["captions"], labels, strict=True):
            yield text, source.classes[label]


def majority(pairs: Sequence[tuple[str, str]], words: int = 0) -> float:
    """The share of texts that the most common answer among those with the same first words gets right."""
    answers: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for text, answer in pairs:
        answers[tuple(text.split()[:words])][answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(pairs)


def baselines(name: str, data: Path) -> tuple[float, float]:
    """Without looking at the picture: the most common answer, and the most common one by the text's first words.

    For retrieval both are chance: one item of all, and on average as many of the texts.
    """
    from scl_jax.data.builders import open_source

    dataset = TASKS[name].dataset
    if "retrieval" in name:
        chance = 1 / len(open_source(dataset, "test", data))
        return chance, chance
    pairs = list(texts_with_answers(data, dataset))
    return majority(pairs), majority(pairs, BEGINNING)


def row(name: str, metric: str, blind: tuple[float, float], found: Sequence[dict[str, float]]) -> str:
    """A line of the table, in per cent."""
    numbers = (*blind, *(results[metric] for results in found))
    return f"| {name} | `{metric}` | " + " | ".join(f"{100 * number:.1f}" for number in numbers) + " |"


def parse(argv: Sequence[str] | None = None) -> tuple[Namespace, list[str]]:
    """The command line; what it does not know goes to every run."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart"), help="the pre-training run")
    parser.add_argument("--out", type=Path, default=Path("runs/downstream"), help="where the runs go")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    return parser.parse_known_args(argv)


def main() -> None:
    """Makes the runs that are missing and prints the table."""
    options, options.overrides = parse()
    if unknown := [argument for argument in options.overrides if not argument.startswith("--config.")]:
        sys.exit(f"error: what is {' '.join(unknown)}? Options of the runs are written --config.name=value")
    for place in ("checkpoint", "out", "data"):
        setattr(options, place, getattr(options, place).absolute())
    lines = [
        "| task | metric, % | most common | most common by beginning | random weights | from the checkpoint |",
        "|---|---|---|---|---|---|",
    ]
    for name in options.tasks:
        pretrained = finetune(name, options, str(options.checkpoint))
        found = [finetune(name, options, ""), pretrained]
        lines += [row(name, metric, baselines(name, options.data), found) for metric in TASKS[name].metrics]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
