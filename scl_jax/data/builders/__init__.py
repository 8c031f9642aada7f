"""Data sets by name: prepare their shards once, open them for random access.

A data set is addressed as "<builder>/<config>" ("toy_world/images", "own_data/my_set"). `<builder>` is the name of a
file in this folder, and that file offers one function:

    def make_builder(config_name: str, data_dir: str, **options) -> tfds.core.DatasetBuilder

or anything that has a TFDS builder's `data_dir` and `download_and_prepare` (see raw.py, for public data sets). The
builder's `name` is the name of its file (TFDS derives it from the class: ToyWorld in toy_world.py), its features come
from `record_features`, and it raises ValueError for a config or an option it does not know. Its shards (array_record)
lie under `<data_dir>/<builder>/<config>/<version>/`. Reading needs that folder only: neither the builder, nor its
options, nor TensorFlow.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import shutil
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

_NAME = re.compile(r"([a-z][a-z0-9_]*)/([A-Za-z0-9][A-Za-z0-9_.-]*)")
_SPLIT_OPTIONS = "evaluate.split and evaluate.final_split name the splits that a run evaluates"
_OPTIONS_FILE = "prepared_with.json"
_LAST_FILE = "dataset_info.json"  # as TFDS writes it: a folder without it is incomplete
_OPENED_AT_ONCE = 16  # shards whose index is looked at


def record_features(**extra: Any) -> tfds.features.FeaturesDict:
    """The TFDS features of every data set: id, media and captions, and what a data set has besides.

    `Text` reads back as str, `Sequence(Text)` as list[str]; `bytes_feature()` as bytes; tensors as numpy arrays.
    Extra features are flat: no dictionary within.
    """
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "media": bytes_feature(),  # an encoded image or video file
            "captions": tfds.features.Sequence(tfds.features.Text()),
            **extra,
        }
    )


def bytes_feature() -> tfds.features.Tensor:
    """A feature of arbitrary bytes, such as an encoded file."""
    return tfds.features.Tensor(shape=(), dtype=np.object_)


class ShardError(ValueError):
    """A shard that cannot be read, or a record in it that does not belong to its data set; the message names both."""


class Shard(NamedTuple):
    """One file of a split and how many records it should hold."""

    path: Path
    records: int


class Source:
    """Random access to the records of one split as plain Python; picklable, for use in worker processes.

    `source[i]` is {"id": str, "media": bytes, "captions": list[str], …extra features of the data set}; what cannot be
    read there is a ShardError.
    """

    classes: tuple[str, ...]  # of labels or answers; none where the data set has neither
    features: tuple[str, ...]  # keys of a record
    shards: tuple[Shard, ...]

    def __init__(self, builder: Any, split: str) -> None:
        features = builder.info.features
        metadata = builder.info.metadata or {}
        info = builder.info.splits[split]
        shards = zip(info.filepaths, info.shard_lengths, strict=True)
        self.shards = tuple(Shard(Path(path), count) for path, count in shards)
        self._ends = list(accumulate(shard.records for shard in self.shards))
        self.classes, self.features = tuple(metadata.get("classes", ())), tuple(features)
        self._text_counts = metadata.get("texts", {}).get(split)
        self._records = builder.as_data_source(split)
        self._texts = [key for key, feature in features.items() if _is_text(feature)]
        self._bytes = [key for key, feature in features.items() if _is_bytes(feature)]
        self._text_lists = [
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Sequence) and _is_text(feature.feature)
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            record = dict(self._records[index])
            for key, value in record.items():  # TFDS reads what is not there as None, or as an empty array
                if value is None or (key in self._bytes and not isinstance(value, bytes)):
                    raise ValueError(f"it has no {key}")
            for key in self._texts:
                record[key] = record[key].decode()
            for key in self._text_lists:
                record[key] = [text.decode() for text in record[key]]
        except Exception as error:  # TFDS and array_record raise whatever a broken file leads them to
            raise self._unreadable(index, error) from error
        return record

    def _unreadable(self, index: int, error: Exception) -> ShardError:
        which = bisect_right(self._ends, index)
        shard, first = self.shards[which], self._ends[which] - self.shards[which].records
        if broken := why_broken(shard):
            return ShardError(broken)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return ShardError(
            f"{shard.path}, record {index - first}: not a record of this data set, with the features "
            f"{', '.join(self.features)} ({reason}); {_REMEDY}"
        )

    def noted_texts(self, index: int) -> int | None:
        """How many texts a record has, as noted when it was written; None where nothing is noted."""
        return None if self._text_counts is None else self._text_counts[index]

    def text_counts(self, records: Sequence[int] | None = None) -> list[int]:
        """How many texts each record has, or each of `records`: as noted when it was written, else read once."""
        noted = self._text_counts
        if noted is None:
            chosen = range(len(self)) if records is None else records
            counts = [len(self[index]["captions"]) for index in chosen]
            if records is None:
                self._text_counts = counts
            return counts
        return noted if records is None else [noted[index] for index in records]


_REMEDY = "copy this file again from where it came, or prepare the data set again"


def why_broken(shard: Shard) -> str:
    """What is wrong with a shard as a whole, in a sentence that names it; "" where its index is whole."""
    try:
        state = shard.path.stat()
        found = _count_records(shard.path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        return f"shard {shard.path} cannot be opened ({error.strerror}); {_REMEDY}"
    except (RuntimeError, ValueError) as error:  # Riegeli's, when a reader of a broken file is closed
        return f"shard {shard.path} is truncated or no array_record file ({str(error)[:160]}); {_REMEDY}"
    if found != shard.records:
        return f"shard {shard.path} holds {found} records, but {shard.records} were written; {_REMEDY}"
    return ""


@functools.cache
def _count_records(path: Path, size: int, modified: int) -> int:
    """Of an array_record file; size and time of change, so that a repaired file is looked at again."""
    del size, modified
    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def open_source(name: str, split: str, data_dir: str | Path, *, whole: bool = True) -> Source:
    """Opens a prepared split, such as `open_source("toy_world/images", "train", "data")`.

    whole: look at the index of every shard; without, a broken one is found when it is read.

    Raises FileNotFoundError when shards are missing, ShardError when one is broken and ValueError when the data set has
    no such split.
    """
    builder_name, config_name = _parse(name)
    folder = _newest_version(Path(data_dir).expanduser() / builder_name / config_name)
    command = f"python -m scl_jax.data.prepare --dataset={name} --out={data_dir}"
    if folder is None:
        raise FileNotFoundError(f"{name}: no prepared shards in {data_dir}; prepare them with `{command}`")
    try:
        builder = tfds.builder_from_directory(str(folder))
        splits = builder.info.splits
    except Exception as error:  # TFDS raises whatever broken files lead it to
        raise ShardError(f"{name}: {folder} cannot be opened ({type(error).__name__}: {error}); {_REMEDY}") from error
    if split not in splits:
        options = "" if split == "train" else f"; {_SPLIT_OPTIONS}"
        raise ValueError(f"{name} in {folder} has no split {split!r}; it has {', '.join(map(repr, splits))}{options}")
    lost = [str(path) for path in splits[split].filepaths if not Path(path).exists()]
    if lost:
        raise FileNotFoundError(
            f"{name}: shards are missing ({', '.join(lost)}); delete {folder}, then run `{command}`"
        )
    source = Source(builder, split)
    if whole:
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
            if broken := [reason for reason in pool.map(why_broken, source.shards) if reason]:
                raise ShardError(f"{name}, split {split}: " + "\n  ".join(broken))
    return source


def prepare(name: str, data_dir: str | Path, *, overwrite: bool = False, **options: Any) -> Path:
    """Writes the shards of a data set and returns their folder; a data set already there is kept.

    `options` go to `make_builder` of the data set and are noted beside the shards, so that a data set prepared with
    other options is a ValueError instead of a silent reuse; `overwrite` deletes it first. What is there without its
    dataset_info.json was left by an attempt that did not end, and is made again.
    """
    builder_name, config_name = _parse(name)
    make_builder = builder_module(builder_name).make_builder
    builder = make_builder(config_name, str(Path(data_dir).expanduser()), **options)
    folder = Path(builder.data_dir)
    options_file = folder / _OPTIONS_FILE
    whole = (folder / _LAST_FILE).exists()
    if folder.exists() and (overwrite or not whole):
        shutil.rmtree(folder)
        builder = make_builder(config_name, str(Path(data_dir).expanduser()), **options)  # without what lay there
    if folder.exists():
        if options_file.exists() and not _noted_as(options_file, options):
            raise ValueError(
                f"{name} in {folder} was prepared with other options ({options_file}); "
                "pass --overwrite to replace it, or choose another output folder"
            )
        return folder
    builder.download_and_prepare(file_format="array_record")
    options_file.write_text(_note(options))
    return folder


def _note(options: Mapping[str, Any]) -> str:
    """The options of which the shards depend: not the number of threads, nor how the path of a folder is written."""
    kept = {name: value for name, value in options.items() if name != "workers"}
    if "source" in kept:
        kept["source"] = str(Path(kept["source"]).expanduser().resolve())
    return json.dumps(kept, indent=2, sort_keys=True, default=str)


def _noted_as(file: Path, options: Mapping[str, Any]) -> bool:
    try:
        return _note(json.loads(file.read_text())) == _note(options)
    except ValueError:  # half a note
        return False


def _is_text(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Text)


def _is_bytes(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Tensor) and feature.shape == () and feature.np_dtype == np.object_


def _parse(name: str) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        problem = f"data set {name!r}: expected '<builder>/<config>', such as 'toy_world/images'"
        if "," in name:
            listed = ",".join(repr(part.strip()) for part in name.split(","))
            problem += f'; several in a config are written "--config.data.images.datasets=({listed})"'
        else:
            problem += "; a name is of letters, digits, '_', '-' and '.', and begins with a letter or digit"
        raise ValueError(problem)
    return match[1], match[2]


def _newest_version(folder: Path) -> Path | None:
    versions = [path.parent for path in folder.glob(f"*.*.*/{_LAST_FILE}")]
    return max(versions, key=lambda path: tfds.core.Version(path.name), default=None)


def builder_module(builder_name: str) -> Any:
    """The file of this folder that makes a data set; ValueError with the known names for another."""
    try:
        return importlib.import_module(f"{__name__}.{builder_name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{builder_name}":
            raise
        known = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if _offers_builder(path))
        raise ValueError(f"no builder {builder_name!r} in {Path(__file__).parent}; known: {', '.join(known)}") from None


def _offers_builder(path: Path) -> bool:
    return re.search(r"^(def make_builder\(|make_builder = )", path.read_text(), re.MULTILINE) is not None
