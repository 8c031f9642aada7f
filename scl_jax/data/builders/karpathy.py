"""Karpathy's split of COCO and Flickr30k: one JSON file with the sentences of every image and its split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scl_jax.data.builders.caption_files import Place
from scl_jax.data.builders.raw import RawItem, RawSplits, RawText
from scl_jax.data.builders.raw_files import Located, each, numbered, read_json, required, value

SPLITS = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}  # ours: theirs


def read_karpathy(
    source: Path, file_names: tuple[str, ...], locate: Callable[[Path, dict[str, Any]], Located]
) -> RawSplits:
    """The splits of a JSON file of Karpathy's; `locate` finds an image by its entry."""
    file = required(source, *file_names)
    images = read_json(file, "images")

    def make(splits: tuple[str, ...], place: Place, entry: dict[str, Any]) -> RawItem | None:
        if value(entry, "split", str) not in splits:
            return None
        texts = tuple(RawText(value(sentence, "raw", object)) for sentence in value(entry, "sentences", list))
        return RawItem(place, value(entry, "filename", str), (locate(source, entry),), texts)

    return RawSplits({ours: each(numbered(file, images), partial(make, theirs)) for ours, theirs in SPLITS.items()})
