"""Files of public data sets: annotations as JSON, tables and arrow files, media under one of several names."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import av
from PIL import Image

from scl_jax.data.builders.caption_files import (
    ArrowCell,
    Place,
    Problem,
    UnusableError,
    a_few,
    arrow_table,
    malformed,
    read_jsonl,
)
from scl_jax.data.builders.raw import Entries, Note, RawItem, RawSplits, RawText

_FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
_FRAMES_PER_SECOND = 3  # of clips that come as folders of frames; only the order of the frames matters
_HELP = "docs/data.md says where it is obtained and where it belongs; --splits leaves splits out"

Rows = Iterable[tuple[Place, Any]]


def required(folder: Path, *names: str) -> Path:
    """The first of the files that exists; FileNotFoundError with all names where there is none."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no {' or '.join(names)}; {_HELP}")


# ---- media ----


@dataclass(frozen=True)
class Located:
    """A file that has one of several names in a folder; a folder of frames in its place becomes a clip."""

    folder: Path
    names: tuple[str, ...]

    def read(self) -> bytes:
        """The encoded image or clip. Raises FileNotFoundError with the names that were tried, or ValueError."""
        for name in self.names:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name!r} leads out of {self.folder}")
            place = self.folder / path
            if place.is_file():
                return place.read_bytes()
            if place.is_dir():
                return pack_frames(place)
        raise FileNotFoundError(f"no file {' or '.join(self.names)} in {self.folder}")


def pack_frames(folder: Path) -> bytes:
    """The pictures of a folder, in order of their names, as one Matroska file; JPEG frames keep every byte.

    Raises:
        ValueError: no picture, or pictures of different sizes.
    """
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in _FRAME_SUFFIXES), key=natural_order)
    if not files:
        raise ValueError(f"the folder of frames {folder} holds no {', '.join(_FRAME_SUFFIXES)}")
    frames = [_as_jpeg(file) for file in files]
    if len(sizes := {size for _, size in frames}) > 1:
        raise ValueError(f"frames of {folder} have different sizes: {', '.join(map(str, sorted(sizes)))}")
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=_FRAMES_PER_SECOND)
        stream.width, stream.height = frames[0][1]
        stream.pix_fmt = "yuvj420p"
        for number, (data, _) in enumerate(frames):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, _FRAMES_PER_SECOND)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return target.getvalue()


def _as_jpeg(file: Path) -> tuple[bytes, tuple[int, int]]:
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.format == "JPEG":
                return data, image.size
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=95)
            return buffer.getvalue(), image.size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"frame {file.name} does not decode: {error}") from error


def natural_order(file: Path) -> list[tuple[int, str]]:
    """A key that puts part_2 before part_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def names_below(folder: Path) -> dict[str, str]:
    """The path of every file below a folder by its name."""
    return {file.name: file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# ---- annotations ----


def read_json(file: Path, key: str = "") -> list[Any]:
    """The list that a JSON file is, or that its object has under `key`.

    Raises:
        ValueError: it is malformed or holds no such list, with the file's name.
    """
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}; it may be cut off, obtain it again") from error
    if key and (not isinstance(values, dict) or key not in values):
        raise ValueError(f"{file} has no {key!r}; is it the owner's file?")
    found = values[key] if key else values
    if not isinstance(found, list):
        what = f"{key!r} in {file}" if key else str(file)
        raise ValueError(f"{what} is a JSON {type(found).__name__}, not a list of entries; is it the owner's file?")
    return found


def numbered(file: Path, values: Iterable[Any]) -> Rows:
    """The entries of a list with their places, from 1."""
    return ((Place(str(file), number), entry) for number, entry in enumerate(values, start=1))


def json_lines(file: Path) -> Iterator[tuple[Place, Any]]:
    """The objects of a file with one a line."""
    return ((place, values) for place, values in read_jsonl(file))


def table(file: Path, separator: str, columns: Sequence[str] = ()) -> Iterator[tuple[Place, dict[str, str] | str]]:
    """The rows of a table by column; `columns` names them where the file does not, and then quotes mean nothing.

    Raises:
        ValueError: the first line, with the names of the columns, is malformed.
    """
    quoting = csv.QUOTE_NONE if columns else csv.QUOTE_MINIMAL
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
        try:
            names = list(columns) or next(rows, [])
        except csv.Error as error:
            raise ValueError(f"{file}: the first line: {malformed(error, 1, rows.line_num)}") from error
        needed = len(names)
        while True:
            place = Place(str(file), rows.line_num + 1)
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield place, malformed(error, place.line, rows.line_num)
                continue
            if row is None:
                return
            if len(row) < needed:
                yield place, f"{len(row)} fields, but {needed} are needed: {', '.join(names)}"
            else:
                yield place, dict(zip([*names, "more"], row, strict=False))


def value(entry: Any, key: str, kind: type | tuple[type, ...] = (str, int)) -> Any:
    """What an entry has under a key; UnusableError where it is missing or of another kind."""
    if not isinstance(entry, dict):
        raise UnusableError(f"a {type(entry).__name__}, not an object with {key!r}")
    if key not in entry:
        raise UnusableError(f"no {key!r} among: {a_few(entry)}")
    if not isinstance(entry[key], kind):
        raise UnusableError(f"{key} is a {type(entry[key]).__name__}: {str(entry[key])[:60]!r}")
    return entry[key]


def note_once(seen: dict[str, Place], what: str, name: str, place: Place) -> None:
    """Notes the place of a name; UnusableError where it has one."""
    if name in seen:
        raise UnusableError(f"{what} {name!r} is that of {seen[name]} too")
    seen[name] = place


def pair(entry: Any) -> tuple[str, Any]:
    """The file and the caption of an entry of a list of pairs; UnusableError for another."""
    if not isinstance(entry, list | tuple) or len(entry) < 2 or not isinstance(entry[0], str):
        raise UnusableError(f"no pair of a file and a caption: {str(entry)[:60]!r}")
    return entry[0], entry[1]


def each(rows: Rows, make: Callable[[Place, Any], RawItem | Note | None]) -> Iterator[RawItem | Note | Problem]:
    """What `make` gives for every row; a row that it calls unusable, or that could not be read, is a Problem."""
    for place, entry in rows:
        if isinstance(entry, str):
            yield Problem(place, entry)
            continue
        try:
            made = make(place, entry)
        except UnusableError as error:
            yield Problem(place, str(error))
        else:
            if made is not None:
                yield made


# ---- ViLT's arrow files ----


def arrow_rows(source: Path, patterns: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[Path, int, dict]]:
    """Rows, without their media, of the files that match; FileNotFoundError or ValueError for files or columns."""
    files = [file for pattern in patterns for file in sorted(source.glob(pattern), key=natural_order)]
    if not files:
        there = ", ".join(sorted(file.name for file in source.glob("*.arrow")))
        raise FileNotFoundError(f"{source} holds no {' or '.join(patterns)}, only {there}; {_HELP}")
    for file in files:
        found = arrow_table(file)
        if missing := [name for name in columns if name not in found.column_names]:
            raise ValueError(f"{file} has no column {', '.join(missing)}; it has {', '.join(found.column_names)}")
        texts = found.select([field.name for field in found.schema if "binary" not in str(field.type)])
        row = 0
        for batch in texts.to_batches():
            for values in batch.to_pylist():
                yield file, row, values
                row += 1


def arrow_captions(files: Mapping[str, Sequence[str]], column: str = "image") -> Callable[[Path], RawSplits]:
    """Reads arrow files with the columns `column`, `caption` and, where they have it, `image_id`."""

    def read(source: Path) -> RawSplits:
        return RawSplits({split: entries(source, patterns) for split, patterns in files.items()})

    def entries(source: Path, patterns: Sequence[str]) -> Entries:
        for file, row, values in arrow_rows(source, patterns, (column, "caption")):
            cell = ArrowCell(file, row, column)
            captions = values["caption"] if isinstance(values["caption"], list) else [values["caption"]]
            name = str(values.get("image_id") or cell.name)
            yield RawItem(Place(str(file), row + 1), name, (cell,), tuple(map(RawText, captions)))

    return read
