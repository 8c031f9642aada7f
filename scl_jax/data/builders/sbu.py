"""SBU Captioned Photos, as "sbu/captions".

    SBU_captioned_photo_dataset_urls.txt       one address a line …
    SBU_captioned_photo_dataset_captions.txt   … and its caption in the same line; or instead of both
    sbu-captions-all.json                      {"image_urls": […], "captions": […]}; or
    annot.json                                 [["folder/4385058960_b0f291553e.jpg", "a caption"], …]
    images/**/4385058960_b0f291553e.jpg        what could be downloaded, named as in its address

One split, `train`. Arrow files: sbu*.arrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scl_jax.data.builders.caption_files import Place
from scl_jax.data.builders.raw import Counts, RawDataset, RawItem, RawSplits, RawText, raw_builder
from scl_jax.data.builders.raw_files import (
    Located,
    arrow_captions,
    each,
    names_below,
    numbered,
    pair,
    read_json,
    required,
)

_URLS, _CAPTIONS = "SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt"
_JSON, _PAIRS = "sbu-captions-all.json", "annot.json"


def read_tree(source: Path) -> RawSplits:
    """Addresses and captions, joined with the files that are there."""
    file = required(source, _URLS, _JSON, _PAIRS)
    folder = required(source, "images", "images_train")
    return RawSplits({"train": _entries(file, folder)})


def _entries(file: Path, folder: Path) -> Iterator:
    found = names_below(folder)

    def make(place: Place, entry: Any) -> RawItem:
        address, caption = pair(entry)
        name = address.strip().rsplit("/", 1)[-1]
        return RawItem(place, name, (Located(folder, (found.get(name) or name,)),), (RawText(caption),))

    yield from each(numbered(file, _pairs(file)), make)


def _pairs(file: Path) -> list[Any]:
    if file.name == _PAIRS:
        return read_json(file)
    if file.name == _JSON:
        urls, captions = read_json(file, "image_urls"), read_json(file, "captions")
    else:
        lists = (file, required(file.parent, _CAPTIONS))
        urls, captions = (path.read_text("utf-8", errors="surrogateescape").split("\n") for path in lists)
        urls, captions = ([*lines[:-1], *filter(None, lines[-1:])] for lines in (urls, captions))
    if len(urls) != len(captions):
        raise ValueError(f"{file}: {len(urls):,} addresses, but {len(captions):,} captions; obtain both again")
    return list(zip(urls, captions, strict=True))


DATASET = RawDataset(
    name="sbu",
    config="captions",
    read_tree=read_tree,
    read_arrow=arrow_captions({"train": ("sbu*.arrow",)}),
    published={"train": Counts(1_000_000, 1_000_000)},
)
make_builder = raw_builder(DATASET)
