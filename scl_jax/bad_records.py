"""Which records a run leaves out (`data.bad_records="skip"`), the same in all processes and after every restart.

<workdir>/skipped.jsonl: one JSON object a record: stream, dataset, split, index (in the split), id, reason.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from scl_jax.config import ConfigError, active_streams
from scl_jax.data.builders import open_source
from scl_jax.data.records import LeftOut
from scl_jax.data.screening import BadRecord, Part, screen
from scl_jax.training.distributed import share

FILE = "skipped.jsonl"
_SHOWN = 3

Line = dict[str, Any]  # of FILE


class BadRecords:
    """The records that a run leaves out, by split; nothing is looked at while `data.bad_records` is "fail"."""

    def __init__(self, config: ConfigDict, workdir: Path):
        self._config, self._workdir = config, workdir
        self._found: dict[str, list[Line]] = {}
        self.notes: list[str] = []  # for the log

    def left_out(self, split: str) -> dict[str, LeftOut]:
        """What is left out of a split, by stream; looks at all its records when it is first asked for.

        Raises:
            ConfigError: more than `data.max_skipped_share` of a data set.
        """
        if self._config.data.bad_records != "skip":
            return {}
        if split not in self._found:
            self._found[split] = self._look(split)
        return {stream: _by_dataset(self._found[split], stream) for stream in active_streams(self._config)}

    def write(self) -> None:
        """Brings FILE up to date: the splits that were looked at; the lines of others stay."""
        if self._config.data.bad_records != "skip":
            return
        lines = [line for line in read(self._workdir) if line["split"] not in self._found]
        lines += [line for found in self._found.values() for line in found]
        file = self._workdir / FILE
        partial_file = file.with_name(f".{FILE}.partial")
        partial_file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        partial_file.replace(file)

    def check_continued(self, before: str) -> None:
        """A run is continued with the examples that it was begun with; `before`: its policy so far.

        Raises:
            ConfigError: other records of the training split are left out than before.
        """
        now = self._config.data.bad_records
        self.left_out("train")
        if before == now == "skip":
            old, new = ({_key(line) for line in lines if line["split"] == "train"} for lines in self._both())
            if old != new:
                first = sorted(old ^ new)[0]
                raise ConfigError(
                    f"{self._workdir} holds a run that left {len(old):,} records out, now they are {len(new):,} (the "
                    f"first difference: {', '.join(map(str, first))}): its shards were changed or repaired. Continue "
                    f"with the shards it was begun with, or choose another --workdir."
                )
        elif before != now and (
            self._found.get("train") or any(line["split"] == "train" for line in read(self._workdir))
        ):
            self.notes.append(f"data.bad_records was {before}, now {now}: another order of examples from here on")

    def _both(self) -> tuple[list[Line], list[Line]]:
        return read(self._workdir), self._found["train"]

    def _look(self, split: str) -> list[Line]:
        config = self._config
        here = Part(
            jax.process_index(), jax.process_count(), partial(share, timeout=config.distributed.compile_timeout)
        )
        lines: list[Line] = []
        for stream in active_streams(config):
            for name in datasets(config, stream, split):
                bad = screen(
                    name,
                    split,
                    config.data.dir,
                    clips=config.data[stream].frames > 1,
                    threads=config.data.threads,
                    fallback=self._workdir / "screened",
                    part=here,
                    show=config.log.console and here.index == 0,
                )
                self._judge(name, split, bad)
                lines += [{"stream": stream, "dataset": name, "split": split, **record._asdict()} for record in bad]
        return lines

    def _judge(self, name: str, split: str, bad: list[BadRecord]) -> None:
        total = len(open_source(name, split, self._config.data.dir, whole=False))
        what = f"{name}, split {split}: {len(bad):,} of {total:,} records ({len(bad) / max(total, 1):.2%})"
        ceiling = self._config.data.max_skipped_share
        if len(bad) > ceiling * total:
            reasons = {record.reason: record for record in reversed(bad)}  # the first record of each
            first = sorted(reasons.values())[:_SHOWN]
            shown = "".join(f"\n  record {r.index} (id {r.id!r}): {r.reason}" for r in first)
            more = f"\n  and {len(bad) - len(first):,} more" if len(bad) > len(first) else ""
            raise ConfigError(
                f"{what} cannot be used, more than data.max_skipped_share {ceiling}:{shown}{more}\n"
                "Prepare the data set again, or raise data.max_skipped_share if so much may be missing."
            )
        if bad:
            self.notes.append(f"{what} cannot be used and are left out: {self._workdir / FILE}")


def datasets(config: ConfigDict, stream: str, split: str) -> list[str]:
    """The data sets whose split a stream reads, to train on or to evaluate."""
    s, e = config.data[stream], config.evaluate
    evaluated = s.evaluation_datasets if any(s.evaluation_datasets) else s.datasets
    names = s.datasets if split == "train" else ()
    names += tuple(evaluated) if split in (e.split, e.final_split) else ()
    return list(dict.fromkeys(name for name in names if name))


def read(workdir: Path) -> list[Line]:
    """The lines of FILE; none where it is not there."""
    file = workdir / FILE
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def _by_dataset(lines: list[Line], stream: str) -> LeftOut:
    found: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        if line["stream"] == stream:
            found.setdefault((line["dataset"], line["split"]), []).append(line["index"])
    return found


def _key(line: Line) -> tuple[str, str, int]:
    return line["stream"], line["dataset"], line["index"]
