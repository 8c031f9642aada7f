"""Which records of a prepared split cannot be used: all of them are looked at before a run that may leave some out.

A record is good when its shard can be read, it has the features of its data set, its texts and targets fit together,
and its media decode, as clips where a stream takes clips. Decoding for training then cannot fail (video.py and
images.py see to it), so a run over the good records is as deterministic as one over a data set without the others.

Looking at a split costs as much as an epoch of decoding. The outcome is kept beside the shards, in
`screened.<images or clips>.<split>.json`, and holds as long as their names, sizes and times of change do. Of several
processes, each looks at its part, and all get the whole list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

from scl_jax.data import builders
from scl_jax.data.builders.problems import map_ahead, progress_bar, why_broken
from scl_jax.data.builders.targets import why_inconsistent
from scl_jax.data.pipeline import decode_clip

Share: TypeAlias = Callable[[str], list[str]]  # a text of this process → those of all processes, in their order
_RULES = 2  # counted up when what makes a record good changes, so that older lists are made again
_CHECKED_FRAMES = 2  # of a clip: the first and the last


class BadRecord(NamedTuple):
    """A record that is left out: its number in the split, its owner's id ("" where it cannot be read), and why."""

    index: int
    id: str
    reason: str


class Part(NamedTuple):
    """Which of how many processes this is, and how they exchange what they found."""

    index: int = 0
    count: int = 1
    share: Share = lambda text: [text]


ALONE = Part()


def screen(
    name: str,
    split: str,
    data_dir: str,
    *,
    clips: bool,
    threads: int,
    fallback: Path,
    part: Part = ALONE,
    show: bool = False,
) -> list[BadRecord]:
    """The bad records of a split, ascending; from the list beside its shards where that still holds.

    clips: the stream takes several frames. fallback: a folder for the list where the shards' own is not writable.
    show: a progress bar.
    """
    source = builders.open_source(name, split, data_dir, whole=False)
    state = _state(source)
    folder = source.shards[0].path.parent if source.shards else fallback
    file = f"screened.{'clips' if clips else 'images'}.{split}.json"
    places = (folder / file, fallback / name.replace("/", ".") / file)
    kept = part.share(json.dumps(_read(places, state)))
    if kept[0] != "null" and len(set(kept)) == 1:
        return _from_json(kept[0])
    mine = range(part.index, len(source), part.count)
    found = _look(source, mine, clips, threads, f"screening {name}, {split}" if show else "")
    everyone = part.share(json.dumps(found))
    bad = sorted(record for text in everyone for record in _from_json(text))
    _write(places, {**state, "bad": bad})
    return bad


def why_unusable(source: builders.Source, index: int, clips: bool) -> BadRecord | None:
    """The record as a bad one, or None where it is good."""
    try:
        record = source[index]
    except builders.ShardError as error:
        return BadRecord(index, "", str(error))
    reason = why_inconsistent(record, len(source.classes), source.noted_texts(index))
    for key in ("media", "second_media"):
        if not reason and key in record:
            reason = _why_undecodable(record[key], clips)
    return BadRecord(index, record["id"], reason) if reason else None


def _why_undecodable(media: bytes, clips: bool) -> str:
    if not clips:
        return why_broken(media, "media")
    try:
        decode_clip(media, _CHECKED_FRAMES)
    except ValueError as error:
        return str(error)
    return ""


def _look(source: builders.Source, indices: Sequence[int], clips: bool, threads: int, title: str) -> list[BadRecord]:
    look = partial(why_unusable, source, clips=clips)
    with progress_bar(disable=not title) as progress:
        looked_at: Iterable[BadRecord | None] = map_ahead(look, indices, threads)
        return [bad for bad in progress.track(looked_at, total=len(indices), description=title) if bad]


# ---- the list beside the shards ----


def _state(source: builders.Source) -> dict[str, object]:
    """What the list depends on: the rules and the files."""
    shards = []
    for shard in source.shards:
        found = shard.path.stat()
        shards.append([shard.path.name, shard.records, found.st_size, found.st_mtime_ns])
    return {"rules": _RULES, "shards": shards}


def _read(places: Sequence[Path], state: dict[str, object]) -> list[BadRecord] | None:
    for place in places:
        try:
            known = json.loads(place.read_text("utf-8"))
            if {key: known[key] for key in state} == state:
                return [BadRecord(int(index), str(id), str(reason)) for index, id, reason in known["bad"]]
        except (OSError, ValueError, KeyError, TypeError):  # none there, or a half-written or foreign one: look again
            continue
    return None


def _write(places: Sequence[Path], content: dict[str, object]) -> None:
    for place in places:
        partial_file = place.with_name(f".{place.name}.{os.getpid()}.partial")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial_file.write_text(json.dumps(content), "utf-8")
            partial_file.replace(place)
            return
        except OSError:  # a folder of others: the next place; without any, the next run looks again
            continue


def _from_json(text: str) -> list[BadRecord]:
    return [BadRecord(*record) for record in json.loads(text)]
