"""Conceptual Captions 3M, as "conceptual_captions/captions".

    Train_GCC-training.tsv                     caption <tab> address [<tab> path of the image]
    Validation_GCC-1.1.0-Validation.tsv
    training/…  validation/…                   what could be downloaded

Without a third column, an image of line N (from 0) may be called `<N>_<crc32 of the address>`, as the usual download
script does, with or without .jpg, or N in nine digits and .jpg, also in a folder for every 10,000 (00002/000020001.jpg)
as img2dataset numbers the rows of a whole table in its format "files". Instead of the tables: train_annot.json and
val_annot.json, [["folder/name.jpg", "a caption"], …], with images below images_train and images_val. Arrow files:
conceptual_caption_{train,val}_*.arrow.
"""

from __future__ import annotations

import zlib
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
    table,
)

_FILES = {  # by split: table, list, folders of images
    "train": ("Train_GCC-training.tsv", "train_annot.json", ("training", "images_train")),
    "validation": ("Validation_GCC-1.1.0-Validation.tsv", "val_annot.json", ("validation", "images_val")),
}
_OF_A_FOLDER = 10_000  # img2dataset's number_sample_per_shard


def read_tree(source: Path) -> RawSplits:
    """Captions and addresses, joined with the files that are there."""
    return RawSplits({split: _entries(source, *files) for split, files in _FILES.items()})


def _entries(source: Path, table_name: str, list_name: str, folders: tuple[str, ...]) -> Iterator:
    file = required(source, table_name, list_name)
    folder = required(source, *folders)
    if file.name == list_name:
        yield from _from_list(file, folder)
        return

    def make(place: Place, entry: dict[str, str]) -> RawItem:
        number, address = place.line - 1, entry["address"]
        stem = f"{number}_{zlib.crc32(address.encode('utf-8', 'surrogateescape'))}"
        numbered_name = f"{number:09d}.jpg"
        names = (stem, f"{stem}.jpg", numbered_name, f"{number // _OF_A_FOLDER:05d}/{numbered_name}")
        names = (entry["more"],) if entry.get("more") else names
        return RawItem(place, f"{folder.name}/{number:09d}", (Located(folder, names),), (RawText(entry["caption"]),))

    yield from each(table(file, "\t", ("caption", "address")), make)


def _from_list(file: Path, folder: Path) -> Iterator:
    found = names_below(folder)

    def make(place: Place, entry: Any) -> RawItem:
        path, caption = pair(entry)
        name = path.rsplit("/", 1)[-1]
        return RawItem(place, name, (Located(folder, (found.get(name) or name,)),), (RawText(caption),))

    yield from each(numbered(file, read_json(file)), make)


DATASET = RawDataset(
    name="conceptual_captions",
    config="captions",
    read_tree=read_tree,
    read_arrow=arrow_captions(
        {"train": ("conceptual_caption_train_*.arrow",), "validation": ("conceptual_caption_val_*.arrow",)}
    ),
    published={"train": Counts(3_318_333, 3_318_333), "validation": Counts(15_840, 15_840)},
)
make_builder = raw_builder(DATASET)
