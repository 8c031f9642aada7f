"""NLVR2, statements about two photographs, as "nlvr2/statements".

    data/train.json  data/dev.json  data/test1.json          one JSON object a line
    images/train/<directory>/train-10171-0-img0.png          (or train/<directory>/…)
    dev/dev-850-0-img0.png  test1/test1-0-0-img0.png         (or images/dev/…)

A record is a pair of images with all its statements. Arrow files: nlvr2_{train,dev,test1}.arrow; they leave out the
last part of an identifier, which then is the place of the statement among those of its pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scl_jax.data.builders.caption_files import ArrowCell, Place, Problem, UnusableError
from scl_jax.data.builders.raw import Counts, Entries, RawDataset, RawItem, RawSplits, RawText, raw_builder
from scl_jax.data.builders.raw_files import Located, arrow_rows, json_lines, note_once, required, value
from scl_jax.data.builders.targets import STATEMENT_CLASSES, UNKNOWN

_SPLITS = ("train", "dev", "test1")
_IDENTIFIER = re.compile(r"[^-]+(-[^-]+){3,}")


def read_tree(source: Path) -> RawSplits:
    """Lines of one pair of images are joined."""
    return RawSplits({split: _entries(source, split) for split in _SPLITS}, STATEMENT_CLASSES)


def _entries(source: Path, split: str) -> Entries:
    file = required(source, f"data/{split}.json", f"{split}.json")
    pairs: dict[str, RawItem] = {}
    seen: dict[str, Place] = {}
    for place, entry in json_lines(file):
        try:
            if isinstance(entry, str):
                raise UnusableError(entry)
            identifier = value(entry, "identifier", str)
            if _IDENTIFIER.fullmatch(identifier) is None:
                raise UnusableError(f"identifier {identifier!r} is not split-set-pair-sentence, such as dev-850-0-0")
            note_once(seen, "identifier", identifier, place)
            pair = identifier.rpartition("-")[0]
            text = RawText(value(entry, "sentence", object), identifier, _label(entry))
            directory = f"{value(entry, 'directory')}/" if split == "train" else ""
        except UnusableError as error:
            yield Problem(place, str(error))
            continue
        if pair in pairs:
            pairs[pair] = pairs[pair]._replace(texts=(*pairs[pair].texts, text))
        else:
            folders = (f"images/{split}", split)
            names = ([f"{folder}/{directory}{pair}-img{side}.png" for folder in folders] for side in (0, 1))
            pairs[pair] = RawItem(place, pair, tuple(Located(source, tuple(side)) for side in names), (text,))
    yield from pairs.values()


def _label(entry: dict[str, Any]) -> int:
    if "label" not in entry:
        return UNKNOWN
    label = str(entry["label"]).lower()
    if label not in STATEMENT_CLASSES:
        raise UnusableError(f"label {entry['label']!r} is neither True nor False")
    return STATEMENT_CLASSES.index(label)


def read_arrow(source: Path) -> RawSplits:
    """The same from ViLT's columns."""
    return RawSplits({split: _arrow_entries(source, split) for split in _SPLITS}, STATEMENT_CLASSES)


def _arrow_entries(source: Path, split: str) -> Iterator[RawItem]:
    columns = ("image_0", "image_1", "questions", "answers", "identifier")
    for file, row, values in arrow_rows(source, (f"nlvr2_{split}.arrow",), columns):
        pair = values["identifier"]
        texts = tuple(
            RawText(statement, f"{pair}-{number}", _label({"label": answer}))
            for number, (statement, answer) in enumerate(zip(values["questions"], values["answers"], strict=True))
        )
        media = (ArrowCell(file, row, "image_0"), ArrowCell(file, row, "image_1"))
        yield RawItem(Place(str(file), row + 1), pair, media, texts)


DATASET = RawDataset(
    name="nlvr2",
    config="statements",
    read_tree=read_tree,
    read_arrow=read_arrow,
    published={"train": Counts(None, 86_373), "dev": Counts(None, 6_982), "test1": Counts(None, 6_967)},
    texts="statement",
)
make_builder = raw_builder(DATASET)
