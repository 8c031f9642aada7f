"""Your own images or videos with captions, as a data set "own_data/<name>".

The files are stored as they are, byte by byte. Formats of caption files: see caption_files.py. Everything is checked
before the first shard is written: captions are texts, files lie in the media folder and decode, ids are unique. What
fails is written to `left_out.jsonl`; it stops the preparation unless `skip_broken` is set.

Splits come, in this order of precedence, from one caption file per split, from a `split` column, or from a hash of the
id (or of the column `split_by`, so that no scene or author is in two splits). The hash makes them stable: files added
later leave the others where they were, except where a split would have been empty.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds

from scl_jax.data.builders import record_features
from scl_jax.data.builders.caption_files import (
    FORMATS,
    ArrowCell,
    MediaFile,
    Place,
    Problem,
    Row,
    UnusableError,
    read_folder,
    read_rows,
    split_name,
)
from scl_jax.data.builders.problems import (
    LEFT_OUT_FILE,
    BrokenRecordsError,
    map_ahead,
    progress_bar,
    why_broken,
    write_list,
)
from scl_jax.data.builders.targets import with_keys

_SHOWN_KEYS = 10  # of those that are not used
DEFAULT_SHARE = 0.05  # of validation and of test, where nothing says the splits


@dataclasses.dataclass(frozen=True)
class Item:
    """An image or video with all its captions."""

    place: Place
    media: MediaFile | ArrowCell
    kind: str
    captions: tuple[str, ...]
    id: str
    split: str
    group: str


@dataclasses.dataclass
class OwnDataConfig(tfds.core.BuilderConfig):
    """Where the files lie and how they are divided; see `make_builder`."""

    captions: tuple[str, ...] = ()
    media: str = ""
    file_format: str = "auto"
    validation: float | None = None
    test: float | None = None
    split_by: str = ""
    skip_broken: bool = False
    workers: int = 2


class OwnData(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of a user's own files."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=record_features(),
            metadata=tfds.core.MetadataDict(),
            description=__doc__ or "",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = cast(OwnDataConfig, self.builder_config)
        items, problems, notes = collect(config)
        wanted = {split for value in config.captions for split, _ in _caption_files(value)} | {i.split for i in items}
        with progress_bar() as progress:
            items, broken = check_media(progress.track(items, description="checking files"), config.workers)
        problems = sorted([*problems, *broken], key=lambda problem: (problem.place.file, problem.place.line))
        if problems:
            write_list(problems, Path(self.data_dir).parent / LEFT_OUT_FILE)
        emptied = sorted(wanted - {item.split for item in items} - {""}) if items else []
        if problems and (emptied or not (config.skip_broken and items)):
            raise BrokenRecordsError(problems, len(items), emptied)
        if not items:
            raise ValueError("own_data: the captions name no file, nothing to prepare")
        if emptied:
            raise ValueError(f"own_data: the captions of split {', '.join(emptied)} name no file; leave them out")
        metadata: Any = self.info.metadata
        metadata["notes"] = {"caption files": notes}
        splits = assign_splits(items, config.validation, config.test)
        return {split: self._generate_examples(split, members) for split, members in splits.items()}

    def _generate_examples(self, split: str, items: Iterable[Item]) -> Iterator[tuple[int, dict[str, Any]]]:
        records = ({"id": item.id, "media": item.media.read(), "captions": list(item.captions)} for item in items)
        return with_keys(records, self.info.metadata, split)


def make_builder(
    config_name: str,
    data_dir: str,
    *,
    captions: Sequence[str] = (),
    media: str = "",
    format: str = "auto",
    validation: float | None = None,
    test: float | None = None,
    split_by: str = "",
    skip_broken: bool = False,
    workers: int = 2,
) -> OwnData:
    """The builder of the files of `captions` and the folder `media`.

    captions: caption files or patterns such as "*.arrow", each optionally as "split=file"; none: `name.txt` beside
    `name.jpg` in the media folder. format: one of FORMATS. validation, test: their shares where nothing says the
    splits, 0.05 each by default. split_by: the column that keeps rows together. workers: threads that check files.
    """
    if not captions and not media:
        raise ValueError("own_data: give --captions=FILE and --media=FOLDER")
    if media and not Path(media).expanduser().is_dir():
        raise FileNotFoundError(f"own_data: the media folder {media} does not exist")
    if format not in FORMATS:
        raise ValueError(f"own_data: format {format!r}; choose one of {', '.join(FORMATS)}")
    for name, share in {"validation": validation, "test": test}.items():
        if share is not None and not 0 <= share < 1:
            raise ValueError(f"own_data: {name}={share}; a share is at least 0 and below 1")
    if (DEFAULT_SHARE if validation is None else validation) + (DEFAULT_SHARE if test is None else test) >= 1:
        raise ValueError("own_data: validation and test leave nothing to train on; lower --validation or --test")
    if workers < 1:
        raise ValueError(f"own_data: workers={workers}; at least 1 is needed")
    config = OwnDataConfig(
        name=config_name,
        captions=tuple(captions),
        media=media,
        file_format=format,
        validation=validation,
        test=test,
        split_by=split_by,
        skip_broken=skip_broken,
        workers=workers,
    )
    return OwnData(config=config, data_dir=data_dir)


# ---- rows to items ----


def collect(config: OwnDataConfig) -> tuple[list[Item], list[Problem], dict[str, int]]:
    """Reads all caption files and joins the rows of each media file; the media are not opened yet.

    Returns the items, what cannot be used, and how often something was passed over, by its description.
    """
    media = Path(config.media).expanduser() if config.media else None
    if config.captions:
        files = [entry for value in config.captions for entry in _caption_files(value)]
        rows = (
            row for split, file in files for row in read_rows(file, config.file_format, media, split, config.split_by)
        )
    else:
        rows = read_folder(Path(config.media).expanduser())
    items, problems, notes = join_rows(rows)
    _check_split_source(items, config)
    return items, problems, notes


def join_rows(rows: Iterable[Row | Problem]) -> tuple[list[Item], list[Problem], dict[str, int]]:
    """One item per media file, with the captions of all its rows in order, repeated ones once; see `collect`."""
    items: dict[MediaFile | ArrowCell, Item] = {}
    owners: dict[str, Item] = {}
    problems: list[Problem] = []
    unused: Counter[str] = Counter()
    given = 0
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        unused.update(row.unused)
        known = items.get(row.media)
        if known is None:
            if row.id in owners:
                other = owners[row.id]
                problems.append(Problem(row.place, f"id {row.id!r} is taken by {other.media.name} ({other.place})"))
                continue
            captions = tuple(dict.fromkeys(row.captions))
            item = Item(row.place, row.media, row.kind, captions, row.id, row.split, row.group)
            owners[row.id] = item
        else:
            if clash := _clash(known, row):
                problems.append(Problem(row.place, clash))
                continue
            item = dataclasses.replace(known, captions=tuple(dict.fromkeys(known.captions + row.captions)))
        items[row.media] = item
        given += len(row.captions)
    repeated = given - sum(len(item.captions) for item in items.values())
    notes = {"captions that a file has already, kept once": repeated} if repeated else {}
    notes |= {f"row(s) with {key[:60]!r}, which is not used": count for key, count in unused.most_common(_SHOWN_KEYS)}
    if len(unused) > _SHOWN_KEYS:
        notes["more keys or columns that are not used"] = len(unused) - _SHOWN_KEYS
    return list(items.values()), problems, notes


def _clash(known: Item, row: Row) -> str:
    for key in ("id", "split", "group", "kind"):
        before, here = getattr(known, key), getattr(row, key)
        if before != here:
            return f"{row.media.name} has {key} {here!r} here and {before!r} in {known.place}"
    return ""


def _caption_files(value: str) -> list[tuple[str, Path]]:
    # "captions.csv", "shards/*.arrow", or either behind "train="
    split, separator, pattern = value.partition("=")
    if not separator or not split.isidentifier() or Path(value).expanduser().exists():
        split, pattern = "", value
    path = Path(pattern).expanduser()
    files = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path)))]
    if not files:
        raise FileNotFoundError(f"own_data: no caption file {pattern}")
    try:
        return [(split_name(split), file) for file in files]
    except UnusableError as error:
        raise ValueError(f"own_data: --captions={value}: {error}") from error


def _check_split_source(items: Sequence[Item], config: OwnDataConfig) -> None:
    named = [item for item in items if item.split]
    if not named:
        return
    if len(named) < len(items):
        unnamed = next(item for item in items if not item.split)
        raise ValueError(f"{unnamed.place}: no split, but {named[0].place} has one; give all rows a split or none")
    if config.validation is not None or config.test is not None or config.split_by:
        raise ValueError(f"the captions say their splits ({named[0].place}): drop --validation, --test and --split_by")


def assign_splits(items: Sequence[Item], validation: float | None, test: float | None) -> dict[str, list[Item]]:
    """Divides items by their split or, where they have none, by the hash of their group or id."""
    if items[0].split:
        splits = sorted({item.split for item in items}, key=_split_order)
        return {split: [item for item in items if item.split == split] for split in splits}
    shares = {"validation": validation, "test": test}
    part_of = _hashed_parts(
        {_group(item) for item in items}, {k: DEFAULT_SHARE if v is None else v for k, v in shares.items()}
    )
    return {
        split: [item for item in items if part_of[_group(item)] == split]
        for split in ("train", "validation", "test")
        if split in part_of.values()
    }


def _hashed_parts(groups: Iterable[str], shares: Mapping[str, float]) -> dict[str, str]:
    place = {group: int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) / 2**64 for group in groups}
    ordered = sorted(place, key=lambda group: (place[group], group))
    part_of = dict.fromkeys(ordered, "train")
    end = 0.0
    for split, share in shares.items():
        begin, end = end, end + share
        part_of.update({group: split for group in ordered if begin <= place[group] < end})
    wanted = ["train", *(split for split, share in shares.items() if share)]
    if len(part_of) < len(wanted):
        raise ValueError(
            f"own_data: {len(part_of)} items or groups cannot fill {', '.join(wanted)}; "
            "pass --validation=0 or --test=0, or add files"
        )
    for split in [split for split in wanted if split not in part_of.values()]:  # few items: every split gets one
        largest = Counter(part_of.values()).most_common(1)[0][0]
        part_of[next(group for group in ordered if part_of[group] == largest)] = split
    return part_of


def _group(item: Item) -> str:
    return item.group or item.id


def _split_order(split: str) -> tuple[int, str]:
    return ({"train": 0, "validation": 1, "test": 2}.get(split, 3), split)


# ---- media ----


def check_media(items: Iterable[Item], workers: int) -> tuple[list[Item], list[Problem]]:
    """Decodes every file (of a clip the first and last frame); returns the items that can be used, in order."""
    good: list[Item] = []
    problems: list[Problem] = []
    for item, reason in map_ahead(lambda item: (item, _why_broken(item)), items, workers):
        if reason:
            problems.append(Problem(item.place, f"{item.media.name}: {reason}"))
        else:
            good.append(item)
    return good, problems


def _why_broken(item: Item) -> str:
    try:
        return why_broken(item.media.read(), item.kind)
    except (OSError, ValueError) as error:
        return str(error)
