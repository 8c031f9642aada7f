"""Prepared splits with records edited, replaced or removed, as shards from elsewhere may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from scl_jax.data.builders import open_source

Edit = Callable[[bytes], bytes | None]  # an encoded record, or None to leave it out


def shard_of(data_dir: Path, name: str, split: str = "train") -> Path:
    """The file of a split that has only one."""
    (shard,) = open_source(name, split, data_dir, whole=False).shards
    return shard.path


def edit_records(data_dir: Path, name: str, edits: Mapping[int, Edit], split: str = "train") -> None:
    """Writes the shard of a split anew with some records edited; the metadata follow where records are removed."""
    shard = shard_of(data_dir, name, split)
    reader = ArrayRecordReader(str(shard))
    records = [reader.read([index])[0] for index in range(reader.num_records())]
    reader.close()
    edited = [edits[index](record) if index in edits else record for index, record in enumerate(records)]
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for record in edited:
        if record is not None:
            writer.write(record)
    writer.close()
    kept = [index for index, record in enumerate(edited) if record is not None]
    if len(kept) < len(records):
        _rewrite_metadata(shard.parent, split, kept)


def _rewrite_metadata(folder: Path, split: str, kept: list[int]) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    next(part for part in info["splits"] if part["name"] == split)["shardLengths"] = [str(len(kept))]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["texts"][split] = [metadata["texts"][split][index] for index in kept]
    (folder / "metadata.json").write_text(json.dumps(metadata))


def spoil_jpeg(record: bytes) -> bytes:
    """The record with the bytes of its JPEG from the middle on overwritten: nothing else changes, not even a length."""
    start = record.index(b"\xff\xd8\xff")
    end = record.index(b"\xff\xd9", start) + 2
    middle = (start + end) // 2
    return record[:middle] + b"\xff\xd9" + bytes(end - middle - 2) + record[end:]


def remove(record: bytes) -> None:
    """The record is left out."""
