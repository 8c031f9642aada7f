"""SNLI-VE, hypotheses about Flickr30k images, as "snli_ve/pairs".

    snli_ve_train.jsonl  snli_ve_dev.jsonl  snli_ve_test.jsonl
    flickr30k-images/4705552913.jpg

A record is an image with all its hypotheses; the premise in words (`sentence1`) is not used. Arrow files, as METER
writes them: snli_{train,dev,test}.arrow with `image`, `sentences` ([premise, hypothesis] each) and `labels`; they hold
neither the images' nor the pairs' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scl_jax.data.builders.caption_files import ArrowCell, Place, Problem, UnusableError
from scl_jax.data.builders.flickr30k import IMAGE_FOLDERS
from scl_jax.data.builders.raw import Counts, Entries, RawDataset, RawItem, RawSplits, RawText, raw_builder
from scl_jax.data.builders.raw_files import Located, arrow_rows, json_lines, note_once, required, value
from scl_jax.data.builders.targets import ENTAILMENT_CLASSES

_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


def read_tree(source: Path) -> RawSplits:
    """Lines of one image are joined."""
    return RawSplits({ours: _entries(source, theirs) for ours, theirs in _SPLITS.items()}, ENTAILMENT_CLASSES)


def _entries(source: Path, split: str) -> Entries:
    images: dict[str, RawItem] = {}
    seen: dict[str, Place] = {}
    for place, entry in json_lines(required(source, f"snli_ve_{split}.jsonl")):
        try:
            if isinstance(entry, str):
                raise UnusableError(entry)
            name = str(value(entry, "Flickr30K_ID"))
            text = RawText(value(entry, "sentence2", object), value(entry, "pairID", str), _label(entry))
            note_once(seen, "pairID", text.id, place)
        except UnusableError as error:
            yield Problem(place, str(error))
            continue
        if name in images:
            images[name] = images[name]._replace(texts=(*images[name].texts, text))
        else:
            media = Located(source, tuple(f"{folder}/{name}.jpg" for folder in IMAGE_FOLDERS))
            images[name] = RawItem(place, name, (media,), (text,))
    yield from images.values()


def _label(entry: dict[str, Any]) -> int:
    label = value(entry, "gold_label", str)
    if label not in ENTAILMENT_CLASSES:
        raise UnusableError(f"gold_label {label!r} is none of {', '.join(ENTAILMENT_CLASSES)}")
    return ENTAILMENT_CLASSES.index(label)


def read_arrow(source: Path) -> RawSplits:
    """The same from METER's columns."""
    return RawSplits({ours: _arrow_entries(source, theirs) for ours, theirs in _SPLITS.items()}, ENTAILMENT_CLASSES)


def _arrow_entries(source: Path, split: str) -> Iterator[RawItem]:
    for file, row, values in arrow_rows(source, (f"snli_{split}.arrow",), ("image", "sentences", "labels")):
        cell = ArrowCell(file, row)
        texts = tuple(
            RawText(sentences[1], f"{cell.name}-{number}", label)
            for number, (sentences, label) in enumerate(zip(values["sentences"], values["labels"], strict=True))
        )
        yield RawItem(Place(str(file), row + 1), cell.name, (cell,), texts)


DATASET = RawDataset(
    name="snli_ve",
    config="pairs",
    read_tree=read_tree,
    read_arrow=read_arrow,
    published={
        "train": Counts(29_783, 529_527),
        "validation": Counts(1_000, 17_858),
        "test": Counts(1_000, 17_901),
    },
    texts="hypothesis",
)
make_builder = raw_builder(DATASET)
