"""Caption files to rows: JSONL, a JSON array, CSV, ViLT's pyarrow files, NLVR's JSON, or `name.txt` beside `name.jpg`.

Every row that cannot be used becomes a `Problem` with its file, line and reason, so that one pass reports all of them.
What makes a whole file unusable (missing, unknown format, a table without the needed columns) is raised.

Keys of a JSONL object or columns of a CSV or TSV table:
  image, video or media   path below the media folder, or a whole path that leads there; the first two also say what
                          the file must be
  caption or captions     a text; in JSON also a list of texts. Rows of the same file add up
  id                      optional; the path by default
  split                   optional: train, validation, test or another name; `val` and `dev` mean validation
"""

from __future__ import annotations

import codecs
import csv
import functools
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

MEDIA_KEYS = ("image", "video", "media")
CAPTION_KEYS = ("caption", "captions")
_HEAD = 1024  # bytes that say what a file is
_FEW = 8  # names that are said of many
_LONG = 60  # characters of a name
_KNOWN_KEYS = (*MEDIA_KEYS, *CAPTION_KEYS, "id", "split")
FORMATS = ("auto", "jsonl", "csv", "arrow", "nlvr")
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_BESIDE = "where name.txt lies beside name.jpg, give the folder as --media, without --captions"
_SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation", "restval": "train"}


@dataclass(frozen=True)
class Place:
    """Where a row was read: a file and its line, row of an arrow file, or entry of a JSON list, all from 1.

    Line 0: the file as a whole.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """A record that is left out, and why."""

    place: Place
    reason: str


@dataclass(frozen=True)
class MediaFile:
    """A file in the media folder, named by its path in there."""

    folder: Path
    name: str

    def read(self) -> bytes:
        """The encoded image or video. Raises OSError."""
        return (self.folder / self.name).read_bytes()


@dataclass(frozen=True)
class ArrowCell:
    """An encoded image inside an arrow file."""

    file: Path
    row: int
    column: str = "image"

    @property
    def name(self) -> str:
        return f"{self.file.stem}/{self.row:07d}"

    def read(self) -> bytes:
        """The encoded image. Raises ValueError where the cell holds none."""
        data = arrow_table(self.file)[self.column][self.row].as_py()
        if not isinstance(data, bytes):
            raise ValueError(f"no bytes in the column {self.column!r}")
        return data


@dataclass(frozen=True)
class Row:
    """One usable row. `kind`: image, video or media (either); `group`: rows of one group go to the same split.

    unused: its keys or columns that mean nothing here.
    """

    place: Place
    media: MediaFile | ArrowCell
    kind: str
    captions: tuple[str, ...]
    id: str
    split: str
    group: str
    unused: tuple[str, ...] = ()


def read_rows(file: Path, file_format: str, media: Path | None, split: str, split_by: str) -> Iterator[Row | Problem]:
    """Reads a caption file of a format of FORMATS (`auto`: by suffix).

    `media` is the folder that paths start from (arrow files need none), `split` the split of the whole file, or "" when
    rows say it, `split_by` the column whose value is the group, or "".

    Raises FileNotFoundError, or ValueError for what spoils the whole file.
    """
    if file.is_dir():
        raise ValueError(f"caption file {file} is a folder; {_BESIDE}")
    if not file.is_file():
        raise FileNotFoundError(f"caption file {file} does not exist")
    if file_format == "auto" and file.suffix.lower() == ".txt":
        raise ValueError(f"caption file {file}: a .txt file does not say of which file it is; {_BESIDE}")
    if file_format == "auto":
        file_format = _SUFFIXES.get(file.suffix.lower(), "")
    if file_format not in FORMATS[1:]:
        raise ValueError(
            f"caption file {file}: unknown format; name it {', '.join(_SUFFIXES)} or choose --format of {FORMATS[1:]}"
        )
    if file_format == "arrow":
        yield from _read_arrow(file, split, split_by)
        return
    _refuse_utf16(file)
    if media is None:
        raise ValueError(f"caption file {file} names files: give the folder that they lie in (--media)")
    read = {"jsonl": read_jsonl, "csv": _read_csv, "nlvr": _read_nlvr}[file_format]
    for place, values in read(file):
        if isinstance(values, str):
            yield Problem(place, values)
        else:
            yield _checked(place, values, media, split, "scene" if file_format == "nlvr" else split_by)


def read_folder(media: Path) -> Iterator[Row | Problem]:
    """Reads a folder in which `name.txt` holds the captions, one a line, of the only other file called `name.…`."""
    files = sorted(path for path in media.rglob("*") if path.is_file() and not path.name.startswith("."))
    texts = {path.with_suffix(""): path for path in files if path.suffix == ".txt"}
    described = set()
    for path in files:
        stem, name = path.with_suffix(""), path.relative_to(media).as_posix()
        place = Place(str(texts.get(stem, path)), 0)
        if path.suffix == ".txt":
            continue
        if stem not in texts:
            yield Problem(place, f"no {stem.name}.txt with its captions beside it")
        elif stem in described:
            yield Problem(place, f"describes more than one file: {name} too")
        else:
            # not splitlines(), which also divides at characters within a line, such as U+2028
            lines = texts[stem].read_text("utf-8-sig", errors="surrogateescape").split("\n")
            captions = [line for line in lines if line.strip()]
            yield _checked(place, {"media": name, "captions": captions}, media, "", "")
        described.add(stem)
    for stem, path in texts.items():
        if stem not in described:
            yield Problem(Place(str(path), 0), "no media file beside it")


def _refuse_utf16(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"caption file {file} is UTF-16; save it as UTF-8 (in Excel: CSV UTF-8)")


# ---- formats: (place, values or the reason why there are none) ----

_Values = Iterator[tuple[Place, Mapping[str, Any] | str]]


def read_jsonl(file: Path) -> _Values:
    """The objects of a file of one JSON object a line, or of one array of them, or why a line or entry is none."""
    entries = _read_array(file)
    for number, entry in enumerate(entries or (), start=1):
        yield Place(str(file), number), _object(entry)
    if entries is not None:
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = Place(str(file), number)
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield place, f"not UTF-8: {error.reason} at byte {error.start}"
            except (ValueError, RecursionError) as error:
                yield place, f"malformed JSON: {error}"
            else:
                yield place, _object(values)


def _object(values: Any) -> Mapping[str, Any] | str:
    if isinstance(values, dict):
        return values
    return f"a JSON {'array' if isinstance(values, list) else type(values).__name__}, not an object"


def _read_array(file: Path) -> list[Any] | None:
    """The entries of a file that is one JSON array with objects in it; None for another."""
    with file.open("rb") as opened:
        if not opened.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return None
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):  # a line that begins so will be said
        return None
    return values if any(isinstance(entry, dict) for entry in values) else None


def _read_csv(file: Path) -> _Values:
    # bytes that are no UTF-8 become lone surrogates here and are reported with their row
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            columns = table.fieldnames or ()
        except csv.Error as error:
            raise ValueError(f"caption file {file}: malformed first line: {error}") from error
        _require_columns(file, columns)
        while True:
            place = Place(str(file), table.reader.line_num + 1)
            try:
                values = next(table, None)
            except csv.Error as error:
                yield place, malformed(error, place.line, table.reader.line_num)
                continue
            if values is None:
                return
            if None in values:
                yield place, f"{len(values[None])} more fields than columns; quote captions that hold the separator"
            else:
                yield place, {key: value for key, value in values.items() if value is not None}


def malformed(error: csv.Error, first: int, last: int) -> str:
    """Why a row of a table, which took these lines, is none; for readers that are strict.

    One that is not would take the rest of a file for a field whose quotation mark is not closed, and say nothing.
    """
    taken = f" Lines {first} to {last} were taken for one row" if last > first else ""
    return f"malformed CSV: {error}; is a quotation mark not closed, or not doubled?{taken}"


def _read_nlvr(file: Path) -> _Values:
    """NLVR (Suhr et al., ACL 2017): true sentences are captions of six images, each the same boxes in another order.

    Paths are below the `images` folder; the first part of the identifier is the scene and the group.
    """
    part = file.stem  # dev.json describes dev-<n>-<m>-<k>.png
    for place, values in read_jsonl(file):
        if isinstance(values, str):
            yield place, values
        elif missing := [key for key in ("sentence", "label", "identifier", "directory") if key not in values]:
            yield place, f"no {', '.join(missing)} among: {a_few(values)}; is this NLVR's JSON?"
        elif values["label"] == "true":
            for k in range(6):
                path = f"{values['directory']}/{part}-{values['identifier']}-{k}.png"
                scene = str(values["identifier"]).split("-")[0]
                yield place, {"image": path, "caption": values["sentence"], "scene": scene}


def _read_arrow(file: Path, split: str, split_by: str) -> Iterator[Row | Problem]:
    table = arrow_table(file)
    _require_columns(file, table.column_names)
    texts = table.select([name for name in table.column_names if name != "image"])
    for row, values in enumerate(row for batch in texts.to_batches() for row in batch.to_pylist()):
        yield _checked(Place(str(file), row + 1), values, ArrowCell(file, row), split, split_by)


@functools.lru_cache(maxsize=64)
def arrow_table(file: Path) -> Any:
    """The table of an arrow file, mapped into memory; ValueError when it is none."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ValueError(f"reading {file} needs pyarrow: pip install pyarrow") from error
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        table.validate(full=True)  # offsets that lead out of the file would crash whoever follows them
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"caption file {file} is no arrow file, or a damaged one: {error}") from error
    return table


def _require_columns(file: Path, columns: Collection[str]) -> None:
    for wanted in (MEDIA_KEYS, CAPTION_KEYS):
        if not set(wanted) & set(columns):
            found = a_few(map(repr, columns)) or "none"
            raise ValueError(
                f"caption file {file}: no column {' or '.join(map(repr, wanted))}; columns found: {found}"
                + _other_separator(file, columns)
            )
    if repeated := [name for name in _KNOWN_KEYS if list(columns).count(name) > 1]:
        raise ValueError(f"caption file {file}: more than one column {repeated[0]!r}; give each text a row of its own")


def _other_separator(file: Path, columns: Collection[str]) -> str:
    """A hint for a first line that another separator would divide."""
    is_tsv = file.suffix.lower() == ".tsv"
    hints = {";": "';'? save it with ','", "\t": "tabs? name it .tsv"} if not is_tsv else {",": "','? name it .csv"}
    for separator, hint in hints.items():
        if any(separator in column for column in columns):
            return f"; are they separated by {hint}"
    return ""


# ---- values to a row ----


class UnusableError(Exception):
    """Why a row cannot be used."""


def _checked(
    place: Place, values: Mapping[str, Any], media: Path | ArrowCell, split: str, split_by: str
) -> Row | Problem:
    try:
        kind = "image" if isinstance(media, ArrowCell) else _only_key(values, MEDIA_KEYS)
        file = media if isinstance(media, ArrowCell) else _media_file(media, checked_text(values[kind], kind))
        caption_key = _only_key(values, CAPTION_KEYS)
        captions = values[caption_key] if isinstance(values[caption_key], list) else [values[caption_key]]
        if not captions:
            raise UnusableError("no caption")
        if split_by and _absent(values.get(split_by)):
            raise UnusableError(f"no {split_by!r} (--split_by) among: {a_few(values)}")
        return Row(
            place=place,
            media=file,
            kind=kind,
            captions=tuple(checked_text(caption, "caption") for caption in captions),
            id=file.name if _absent(values.get("id")) else checked_text(str(values["id"]), "id"),
            split=split or split_name(values.get("split")),
            group=checked_text(str(values[split_by]), split_by) if split_by else "",
            unused=tuple(key for key in values if key not in (*_KNOWN_KEYS, split_by)),
        )
    except UnusableError as error:
        return Problem(place, str(error))


def _only_key(values: Mapping[str, Any], wanted: tuple[str, ...]) -> str:
    found = [key for key in wanted if not _absent(values.get(key))]
    if not found:
        empty = [key for key in wanted if key in values]
        among = a_few(values) or "nothing"
        raise UnusableError(f"empty {empty[0]}" if empty else f"no {' or '.join(map(repr, wanted))} among: {among}")
    if len(found) > 1:
        raise UnusableError(f"both {' and '.join(map(repr, found))}; keep one")
    return found[0]


def _absent(value: Any) -> bool:
    # an empty field of a CSV table, or of a pandas table whose rows were written as JSON
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def a_few(names: Iterable[Any]) -> str:
    """The first of some names, cut where they are long, and how many there are."""
    texts = [str(name) for name in names]
    shown = [text if len(text) <= _LONG else f"{text[:_LONG]}…" for text in texts[:_FEW]]
    return ", ".join(shown) + (f", … ({len(texts)} in all)" if len(texts) > _FEW else "")


def checked_text(value: Any, name: str) -> str:
    """A text that can be used, without blanks around it; UnusableError calls it by `name`."""
    if not isinstance(value, str):
        raise UnusableError(f"{name} is no text but {type(value).__name__}")
    if not value.strip():
        raise UnusableError(f"empty {name}")
    if "\0" in value:
        raise UnusableError(f"{name} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableError(f"{name} is not UTF-8: {ascii(value[:60])}") from None
    return value.strip()


def split_name(value: Any) -> str:
    """The name of a split, "" where there is none; UnusableError for what cannot be one."""
    if _absent(value):
        return ""
    name = str(value).strip().lower()
    if not name.isidentifier() or not name.isascii() or name == "all":
        raise UnusableError(f"split {value!r} is no name of letters, digits and _")
    return _SPLIT_NAMES.get(name, name)


def _media_file(folder: Path, name: str) -> MediaFile:
    path = _inside(folder, PurePosixPath(name))
    if path is None:
        raise UnusableError(f"{name!r} leads out of the media folder {folder}")
    try:
        exists = (folder / path).is_file()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise UnusableError(f"{name[:60]!r}: {error.strerror}") from None
    if not exists:
        raise UnusableError(f"no file {name!r} in the media folder {folder}")
    return MediaFile(folder, str(path))


def _inside(folder: Path, path: PurePosixPath) -> PurePosixPath | None:
    """The path below the folder, from there or from the root; None: it leads out.

    Links in the folder are followed (data folders are full of them); a row itself cannot lead out of it.
    """
    if ".." not in path.parts:
        if not path.is_absolute():
            return path
        for outer in (folder.absolute(), folder.resolve()):
            if path.is_relative_to(outer):
                return path.relative_to(outer)
    end, outer = PurePosixPath(os.path.realpath(folder / path)), os.path.realpath(folder)
    return end.relative_to(outer) if end.is_relative_to(outer) else None
