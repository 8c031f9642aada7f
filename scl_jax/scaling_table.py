"""Tables of what fits where: `python -m scl_jax.scaling_table --plan=sizes,weak` compiles and writes docs/scaling.md.

Every step of a plan is compiled in a process of its own by `scl_jax.compile_tpu` (8 minutes of a core and more, up to
14 GiB of memory); what is already in the records is not compiled again, so that a sweep can be interrupted. Without
--plan the tables are only written anew.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import app, flags

GIB, MIB = 2**30, 2**20
Record = dict[str, Any]  # the fields of compile_tpu.Findings

_PLANS = flags.DEFINE_list("plan", [], "Plans to compile: sizes, weak, batches; or a step of one, such as weak/3.")
_RECORDS = flags.DEFINE_string("records", "docs/scaling.jsonl", "What compile_tpu found, a line a step.")
_OUT = flags.DEFINE_string("tables", "docs/scaling.md", "The tables.")


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step to compile."""

    config: str
    stream: str
    topology: str
    batch_size: int
    fsdp: int = 1
    accumulate: int = 1
    remat: str = "auto"

    def command(self, records: str) -> list[str]:
        """The arguments of `python`."""
        return [
            *("-m", "scl_jax.compile_tpu", f"--config=configs/{self.config}.py", f"--topology={self.topology}"),
            *(f"--mesh=data=-1,fsdp={self.fsdp}", f"--streams={self.stream}", f"--record={records}"),
            f"--config.data.{self.stream}.batch_size={self.batch_size}",
            f"--config.train.accumulate={self.accumulate}",
            f"--config.model.remat={self.remat}",
            f"--config.evaluate.batch_size={self.batch_size}",  # the config's need not divide by so many chips
        ]

    def is_in(self, records: Iterable[Record]) -> bool:
        """Whether it has been compiled."""
        names = ("config", "stream", "topology", "batch_size", "accumulate")
        wanted = tuple(getattr(self, name) for name in names)
        same = [r for r in records if (*(r[name] for name in names),) == wanted and r["mesh"]["fsdp"] == self.fsdp]
        return any(r["fits"] if self.remat == "auto" else r["remat"] == self.remat for r in same)


SLICES = {8: "2x2x2", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16"}
PLANS: dict[str, list[Step]] = {
    "sizes": [
        Step("pretrain_joint", "images", "v5e:16x16", 4096, fsdp=8),
        Step("pretrain_image", "images", "v6e:8x8", 4096, fsdp=8),
        Step("pretrain_image", "images", "v4:4x4x4", 1024, fsdp=8),
        Step("pretrain_large", "images", "v5e:16x16", 4096, fsdp=8),
        Step("pretrain_joint", "videos", "v5e:16x16", 1024, fsdp=8),
    ],
    # 16 images a chip; parameters over four chips, so that the smallest slice, too, has an axis for data alone
    "weak": [
        Step("pretrain_image", "images", f"v5p:{s}", 16 * chips, fsdp=4, remat="none") for chips, s in SLICES.items()
    ],
    # one slice, larger batches by accumulation
    "batches": [
        Step("pretrain_image", "images", "v5e:16x16", 4096 * times, fsdp=8, accumulate=times) for times in (2, 4, 8, 16)
    ],
}

_HEAD = """# What fits where

Compiled by the real TPU compiler for chips that were not there (`python -m scl_jax.compile_tpu`), the very step that
training runs, with all objectives on. Written by `python -m scl_jax.scaling_table` from `scaling.jsonl`, which holds
all numbers. Nothing here was measured on a TPU: memory and FLOPs are the compiler's, seconds are its own.

Memory is that of one chip: arguments (parameters, optimizer state, batch), temporaries, and their sum with the
program's code, against what a program may use; `model.remat=auto` takes the first of `none`, `dots` and `full` that
needs at most nine tenths of it. FLOPs are those of a chip in one step, of matrix products, recomputation
included: of the compiled program, and of the program as written divided by the chips; where the first is larger,
chips do the same work twice. Collectives are the bytes that a chip sends in one step if rings carry them.

The compiler's guess is what its cost model gives for all but kernels, collectives and copies in the background.

A row is as old as its record. One without a guess is of code with plain attention and layers in a loop (before the end
of 29 November), which needs more memory and time; where FLOPs as written differ for as many samples a chip of one
config and policy, too, the code has changed in between.
"""


def read(records: Path) -> list[Record]:
    """The records; the last of one step counts.

    Raises:
        ValueError: a line is none of them.
    """
    if not records.exists():
        return []
    latest: dict[tuple, Record] = {}
    for number, line in enumerate(records.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            mesh = tuple(record["mesh"].items())
            names = ("config", "stream", "topology", "batch_size", "accumulate", "remat")
            latest[(*(record[name] for name in names), mesh)] = record
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{records}, line {number}: no record of scl_jax.compile_tpu ({error})") from error
    return list(latest.values())


def row(record: Record) -> list[str]:
    """A line of the table of sizes."""
    sent = {kind: f"{size / MIB:.0f}" for kind, (_, size) in record["collectives"].items()}
    collectives = ", ".join(f"{kind} {size}" for kind, size in sent.items() if size != "0")
    mesh = " × ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
    batch = str(record["batch_size"]) + (f" in {record['accumulate']} parts" if record["accumulate"] > 1 else "")
    first = [record["config"], record["stream"], record["topology"], str(record["chips"]), mesh, batch, record["remat"]]
    if record["problem"]:
        return [*first, "refused", *[""] * 5]
    memory = f"{record['arguments'] / GIB:.2f} + {record['temporaries'] / GIB:.2f}"
    total = f"{record['total'] / GIB:.2f} of {record['hbm'] / GIB:.2f}" + ("" if record["fits"] else ", does not fit")
    flops = f"{record['flops'] / 1e12:.2f} ({record['traced_flops'] / 1e12:.2f})"
    guess = sum(record.get("seconds_by_scope", {}).values())
    times = f"{1e3 * guess:.0f}" if guess else ""
    return [*first, memory, total, flops, times, collectives, str(len(record["warnings"]))]


def table(records: list[Record]) -> str:
    """All steps, as Markdown."""
    head = ["config", "stream", "slice", "chips", "mesh", "batch", "remat", "arguments + temporaries, GiB"]
    head += ["total, GiB", "TFLOPs a chip (as written)", "compiler's guess, ms", "MiB sent a chip", "warnings"]
    lines = [head, ["---"] * len(head), *(row(record) for record in records)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def command(record: Record) -> str:
    """The command that a record came from."""
    stream, mesh = record["stream"], ",".join(f"{axis}={size}" for axis, size in record["mesh"].items() if size > 1)
    words = [f"--config=configs/{record['config']}.py", f"--topology={record['topology']}", f"--mesh={mesh}"]
    words += [f"--streams={stream}", f"--config.data.{stream}.batch_size={record['batch_size']}"]
    words += [f"--config.model.remat={record['remat']}"]
    words += [f"--config.train.accumulate={record['accumulate']}"] * (record["accumulate"] > 1)
    words += [f"--config.evaluate.batch_size={record['batch_size']}"] * (record["chips"] > 256)
    return " ".join(["python -m scl_jax.compile_tpu", *words])


def commands(records: list[Record]) -> str:
    """The commands of all records, each once."""
    return "\n".join(["```bash", *dict.fromkeys(command(record) for record in records), "```"])


def weak_scaling(records: list[Record]) -> str:
    """The same batch a chip on more and more chips, relative to the fewest; empty with fewer than two."""
    steps = {(step.topology, step.batch_size, step.fsdp, step.remat) for step in PLANS["weak"]}
    chosen = sorted(
        (
            record
            for record in records
            if (record["topology"], record["batch_size"], record["mesh"]["fsdp"], record["remat"]) in steps
            and record["config"] == "pretrain_image"
            and not record["problem"]
            and record["accumulate"] == 1
        ),
        key=lambda record: record["chips"],
    )
    if len(chosen) < 2:
        return ""
    base = chosen[0]
    kinds = list(dict.fromkeys(kind for record in chosen for kind in record["collectives"]))
    head = ["chips", "batch", "TFLOPs a chip", "", "memory a chip, GiB", "", *(f"{kind}, MiB" for kind in kinds)]
    lines = [head, ["---:"] * len(head)]
    for record in chosen:
        sent = [record["collectives"].get(kind, (0, 0))[1] for kind in kinds]
        flops, total = record["flops"] / base["flops"] - 1, record["total"] / base["total"] - 1
        lines.append(
            [
                *(str(record["chips"]), str(record["batch_size"])),
                *(f"{record['flops'] / 1e12:.3f}", f"{flops:+.1%}", f"{record['total'] / GIB:.2f}", f"{total:+.1%}"),
                *(f"{size / MIB:.1f}" for size in sent),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def document(records: list[Record]) -> str:
    """docs/scaling.md."""
    text = f"{_HEAD}\n## Steps\n\n{table(records)}\n\n{commands(records)}\n"
    if weak := weak_scaling(records):
        what = "`pretrain_image`, 16 images a chip on v5p slices, parameters over 4 chips, nothing computed again."
        text += f"\n## Weak scaling\n\n{what}\n\n{weak}\n"
    return text


def chosen_steps(plans: list[str]) -> list[Step]:
    """The steps of plans named "weak", or "weak/3" for its fourth.

    Raises:
        ValueError: there is no such plan or step.
    """
    steps = []
    for name in plans:
        plan, _, number = name.partition("/")
        if plan not in PLANS or (number and not (number.isdigit() and int(number) < len(PLANS[plan]))):
            raise ValueError(f"--plan={name}: choose {', '.join(PLANS)}, or a step of one, such as weak/3")
        steps += [PLANS[plan][int(number)]] if number else PLANS[plan]
    return steps


def main(argv: list[str]) -> None:
    """Runs the command."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {' '.join(argv[1:])}? Options are written --name=value")
    records, out = Path(_RECORDS.value), Path(_OUT.value)
    try:
        steps = chosen_steps(_PLANS.value)
        out.write_text(document(read(records)), encoding="utf-8")  # first, so that a wrong path is said at once
        for step in steps:
            if not step.is_in(read(records)):
                command = [sys.executable, *step.command(str(records))]
                subprocess.run(command, check=False)  # refused ones are records, too
            out.write_text(document(read(records)), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
