"""The records of the data sets of a stream as one sequence, and which of them take part."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Any, SupportsIndex, TypeAlias, cast

import numpy as np

from scl_jax.data import builders

LeftOut: TypeAlias = Mapping[tuple[str, str], Sequence[int]]  # (data set, split) → records that do not take part
NOTHING: Mapping[Any, Any] = MappingProxyType({})


class RecordError(ValueError):
    """A record that cannot be used, with its data set, split, index and id."""


@dataclass(frozen=True)
class Record:
    """One record and where it came from."""

    media: bytes
    captions: Sequence[str]
    item_id: int
    origin: str  # "toy_world/images, split train, record 17 (id 'scene-17')"
    extra: Mapping[str, Any] = field(default_factory=dict)  # what the data set has besides
    name: str = ""  # the owner's id

    def caption(self, index: int) -> str:
        """The caption of this index; RecordError when it is empty."""
        if not self.captions or not self.captions[index].strip():
            raise self.error(f"caption {index} is empty", "give it a caption or leave it out, then prepare again")
        return self.captions[index]

    def error(self, problem: str, remedy: str) -> RecordError:
        """A RecordError that names this record."""
        return RecordError(f"{self.origin}: {problem}; {remedy}")


class Records:
    """Random access to the concatenated records of several data sets but for those left out, for Grain.

    Raises:
        ValueError: no data set is named, or they hold no record.
    """

    def __init__(self, names: Sequence[str], split: str, data_dir: str, left_out: LeftOut = NOTHING):
        self._names = [name for name in names if name]
        if not self._names:
            raise ValueError("no data set is named; set `datasets` of a data stream, e.g. ('toy_world/images',)")
        self._split = split
        opened = [_open(name, split, data_dir, left_out.get((name, split), ())) for name in self._names]
        self._sources = [source for source, _ in opened]
        self._kept = [kept for _, kept in opened]
        self._starts = [0, *accumulate(len(kept) for kept in self._kept)]
        if len(self) == 0:
            raise ValueError(f"split {split} of {', '.join(self._names)} holds no usable record; prepare it again")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: SupportsIndex) -> Record:
        item_id = index.__index__()
        which = bisect_right(self._starts, item_id) - 1
        local = int(self._kept[which][item_id - self._starts[which]])
        raw = self._sources[which][local]
        origin = f"{self._names[which]}, split {self._split}, record {local} (id {raw['id']!r})"
        extra = {key: value for key, value in raw.items() if key not in ("id", "media", "captions")}
        return Record(raw["media"], raw["captions"], item_id, origin, extra, raw["id"])

    def text_counts(self) -> list[int]:
        """How many texts each record has."""
        counts = []
        for source, kept in zip(self._sources, self._kept, strict=True):
            counts += source.text_counts(None if len(kept) == len(source) else kept)
        return counts


def _open(name: str, split: str, data_dir: str, left_out: Sequence[int]) -> tuple[builders.Source, Sequence[int]]:
    """A split and the numbers of the records that take part."""
    if not left_out:
        source = builders.open_source(name, split, data_dir)
        return source, range(len(source))
    source = builders.open_source(name, split, data_dir, whole=False)
    return source, cast(Sequence[int], np.setdiff1d(np.arange(len(source)), np.asarray(left_out)))
