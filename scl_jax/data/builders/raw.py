"""Public data sets, from their owners' files or from ViLT's arrow files, to shards: what all their builders share.

A data set is one small file: a function that reads the annotations of each split (`read_tree`), another that reads
arrow files of the same content, and published counts; `raw_builder(RawDataset(…))` makes its `make_builder`. Here the
texts are checked, the media are read and decoded once by a pool of threads, and shards are written as they come.

Splits are written one after the other, each to a folder of its own, and put together at the end: what a preparation
that was interrupted had finished is not made again. What cannot be used goes to LEFT_OUT_FILE, and stops the
preparation after all splits unless `skip_broken` is given.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tensorflow_datasets as tfds
from tensorflow_datasets.core.splits import SplitDict

from scl_jax.data.builders import record_features
from scl_jax.data.builders.caption_files import Place, Problem, UnusableError, checked_text
from scl_jax.data.builders.problems import (
    LEFT_OUT_FILE,
    BrokenRecordsError,
    map_ahead,
    progress_bar,
    why_broken,
    write_list,
)
from scl_jax.data.builders.targets import (
    UNKNOWN,
    Record,
    label_features,
    label_targets,
    question_features,
    question_targets,
)

_SHARD = {"image": 1000, "video": 100}  # records of a shard, which is held in memory while it is written
_DONE_FILE = "finished.json"  # in the folder of a finished split: the options that it was made with


class Medium(Protocol):
    """An encoded image or clip, wherever it lies."""

    def read(self) -> bytes:
        """The encoded file; OSError or ValueError with the reason when there is none."""
        ...


class RawText(NamedTuple):
    """A caption, question, statement or hypothesis, as it was found, and its target."""

    text: Any
    id: str = ""
    label: int = UNKNOWN
    scores: Mapping[int, float] = {}  # soft targets of answers, by class
    answers: tuple[str, ...] = ()  # the ten raw ones


class RawItem(NamedTuple):
    """An image, a clip or a pair of images, with its texts; nothing is checked yet."""

    place: Place
    id: str
    media: tuple[Medium, ...]
    texts: tuple[RawText, ...]


class Note(NamedTuple):
    """Something that is left out on purpose, counted by its text."""

    text: str


Entries = Iterable[RawItem | Problem | Note]


@dataclass(frozen=True)
class RawSplits:
    """The entries of each split, read when they are iterated over, and the names of the classes."""

    entries: Mapping[str, Entries]
    classes: tuple[str, ...] = ()


class Counts(NamedTuple):
    """Published numbers of a split; None where none is published."""

    items: int | None
    texts: int | None


@dataclass(frozen=True)
class RawDataset:
    """What differs between the data sets; `texts`: what a text of it is."""

    name: str
    config: str
    read_tree: Callable[[Path], RawSplits]
    read_arrow: Callable[[Path], RawSplits]
    published: Mapping[str, Counts]
    texts: str = "caption"
    medium: str = "image"


_FEATURES: dict[str, Callable[[], tfds.features.FeaturesDict]] = {
    "caption": record_features,
    "question": question_features,
    "statement": partial(label_features, two_images=True),
    "hypothesis": label_features,
}


def raw_builder(dataset: RawDataset) -> Callable[..., RawPreparation]:
    """The `make_builder` of a data set."""

    def make_builder(
        config_name: str,
        data_dir: str,
        *,
        source: str = "",
        splits: Sequence[str] = (),
        skip_broken: bool = False,
        workers: int = 4,
    ) -> RawPreparation:
        if config_name != dataset.config:
            raise ValueError(f"{dataset.name} has the config {dataset.config!r}, not {config_name!r}")
        if not source or not Path(source).expanduser().is_dir():
            found = f"{source} is no folder" if source else "none is given"
            raise FileNotFoundError(
                f"{dataset.name}: name the folder of its files with --source ({found}); "
                "docs/data.md says what lies there"
            )
        if unknown := sorted(set(splits) - set(dataset.published)):
            raise ValueError(f"{dataset.name} has no split {', '.join(unknown)}; it has {', '.join(dataset.published)}")
        if workers < 1:
            raise ValueError(f"{dataset.name}: workers={workers}; at least 1 is needed")
        wanted = tuple(split for split in dataset.published if split in (splits or dataset.published))
        return RawPreparation(dataset, Path(source).expanduser(), Path(data_dir), wanted, skip_broken, workers)

    return make_builder


class RawPreparation:
    """Reads a data set from the folder `source` and writes the shards of `splits` (as a TFDS builder would)."""

    def __init__(
        self,
        dataset: RawDataset,
        source: Path,
        data_dir: Path,
        splits: Sequence[str],
        skip_broken: bool,
        workers: int,
    ):
        self._dataset, self._source, self._splits = dataset, source, splits
        self._skip_broken, self._workers = skip_broken, workers
        self._root = data_dir
        self._target = _split_builder(dataset, data_dir)

    @property
    def data_dir(self) -> str:
        """The folder of the shards."""
        return str(self._target.data_dir)

    def download_and_prepare(self, file_format: str) -> None:
        """Writes every split that is not finished, then puts them together; `file_format` is array_record.

        Raises:
            BrokenRecordsError: some records cannot be used; splits that were finished are kept for the next attempt.
            FileNotFoundError, ValueError: for what spoils a whole file.
        """
        if file_format != "array_record":
            raise ValueError(f"{self._dataset.name}: shards are written as array_record, not {file_format}")
        folder = Path(self.data_dir)
        parts = folder.parent / "parts"
        from_arrow = any(self._source.glob("*.arrow"))
        read = (self._dataset.read_arrow if from_arrow else self._dataset.read_tree)(self._source)
        entries = {split: _begun(read.entries[split]) for split in self._splits}  # a file that is missing is said first
        written = {split: self._write(split, entries[split], read.classes, parts / split) for split in self._splits}
        problems = [Problem(Place(*place), reason) for part in written.values() for place, reason in part["problems"]]
        usable = {split: len(part["texts"]) for split, part in written.items()}
        report = folder.parent / LEFT_OUT_FILE
        report.unlink(missing_ok=True)
        if problems:
            write_list(problems, report)
        emptied = [split for split, count in usable.items() if not count]
        if problems and (emptied or not self._skip_broken):
            raise BrokenRecordsError(problems, sum(usable.values()), emptied)
        if emptied:
            left = "; ".join(f"{count:,} {note}" for part in emptied for note, count in written[part]["notes"].items())
            why = f" but what is left out ({left})" if left else ""
            raise ValueError(f"{self._dataset.name}: {self._source} holds nothing of split {', '.join(emptied)}{why}")
        self._join(parts, written, read.classes)
        shutil.rmtree(parts)

    def _write(self, split: str, entries: Entries, classes: Sequence[str], folder: Path) -> dict[str, Any]:
        """Writes one split to a folder of its own, unless that is done; returns what is to be known about it."""
        done = folder / _DONE_FILE
        options = {"source": str(self._source.resolve()), "classes": list(classes)}
        if done.exists():
            report = json.loads(done.read_text())
            if report["options"] == options and (self._skip_broken or not report["problems"]):
                return report
        shutil.rmtree(folder, ignore_errors=True)
        report = {"options": options, "texts": [], "notes": Counter(), "problems": []}
        items: list[RawItem] = []
        for entry in entries:
            if isinstance(entry, RawItem):
                items.append(entry)
            elif isinstance(entry, Problem):
                report["problems"].append((astuple(entry.place), entry.reason))
            else:
                report["notes"][entry.text] += 1
        folder.mkdir(parents=True)
        if items:
            with progress_bar() as progress:
                bar = progress.add_task(f"{self._dataset.name}, {split}", total=len(items))
                builder = _split_builder(self._dataset, folder)
                builder.shards = {split: self._shards(items, report, lambda: progress.advance(bar))}
                builder.download_and_prepare()
        if self._skip_broken or not report["problems"]:  # else it is made again, once its files are repaired
            done.write_text(json.dumps(report))
        return report

    def _shards(
        self, items: Sequence[RawItem], report: dict[str, Any], advance: Callable[[], None]
    ) -> list[Callable[[], Iterator[tuple[int, Record]]]]:
        def write(start: int) -> Iterator[tuple[int, Record]]:
            chunk = items[start : start + size]
            loaded = map_ahead(partial(load, self._dataset), chunk, self._workers)
            for key, (record, problems) in enumerate(loaded, start=start):
                advance()
                report["problems"] += [(astuple(problem.place), problem.reason) for problem in problems]
                if record is not None:
                    report["texts"].append(len(record["captions"]))
                    yield key, record

        size = _SHARD[self._dataset.medium]
        return [partial(write, start) for start in range(0, len(items), size)]

    def _join(self, parts: Path, written: Mapping[str, dict[str, Any]], classes: Sequence[str]) -> None:
        """Puts the shards of the splits and what describes them in one folder, which appears whole or not at all.

        Those of `parts` stay, so that a preparation that is killed here has lost nothing.
        """
        target = Path(self.data_dir)
        joined = target.with_name("joined")
        shutil.rmtree(joined, ignore_errors=True)
        joined.mkdir(parents=True)
        infos = []
        for split in written:
            builder = _split_builder(self._dataset, parts / split)
            info = builder.info.splits[split]
            for path in info.filepaths:
                _link(Path(path), joined)
            infos.append(info.replace(filename_template=info.filename_template.replace(data_dir=target)))
        whole = self._target.info
        whole.metadata["classes"] = list(classes)
        for key in ("texts", "notes"):
            whole.metadata[key] = {split: report[key] for split, report in written.items()}
        whole.set_splits(SplitDict(infos))
        whole.write_to_directory(joined)
        joined.rename(target)


def _link(file: Path, folder: Path) -> None:
    try:
        (folder / file.name).hardlink_to(file)
    except OSError:  # a file system without hard links
        shutil.copy2(file, folder)


class _SplitBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """TFDS builder of shards that are given to it."""

    VERSION = tfds.core.Version("1.0.0")
    dataset: RawDataset
    shards: dict[str, list[Callable[[], Iterator[tuple[int, Record]]]]]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=_FEATURES[self.dataset.texts](),
            metadata=tfds.core.MetadataDict(),
            description=f"{self.dataset.name}/{self.dataset.config}",
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, Record]]]]]:
        return self.shards


def _split_builder(dataset: RawDataset, data_dir: Path) -> Any:
    # TFDS takes the name of a data set from its class; registered, it would clash with data sets of TFDS's own
    class Builder(_SplitBuilder, skip_registration=True):
        name = dataset.name

    Builder.dataset = dataset
    config = tfds.core.BuilderConfig(name=dataset.config)
    return Builder(config=config, data_dir=str(data_dir), file_format="array_record")


# ---- entries to records ----


def _begun(entries: Entries) -> Entries:
    """The same entries, once the first is read: opens the files."""
    iterator = iter(entries)
    first = list(islice(iterator, 1))
    return chain(first, iterator)


def load(dataset: RawDataset, item: RawItem) -> tuple[Record | None, list[Problem]]:
    """Reads the media of an item and checks its texts; None where nothing is left. Runs in many threads."""
    media: list[bytes] = []
    for medium in item.media:
        try:
            media.append(medium.read())
        except (OSError, ValueError) as error:
            return None, [Problem(item.place, f"{item.id}: {error}")]
        if reason := why_broken(media[-1], dataset.medium):
            return None, [Problem(item.place, f"{item.id}: {reason}")]
    problems: list[Problem] = []
    texts: list[RawText] = []
    for text in item.texts:
        try:
            texts.append(text._replace(text=checked_text(text.text, dataset.texts)))
        except UnusableError as error:
            name = f"{item.id}, {dataset.texts} {text.id}" if text.id else item.id
            problems.append(Problem(item.place, f"{name}: {error}"))
    if not texts:
        return None, problems or [Problem(item.place, f"{item.id}: no {dataset.texts}")]
    record = {"id": item.id, "media": media[0], "captions": [text.text for text in texts]}
    return record | _targets(dataset, texts) | ({"second_media": media[1]} if len(media) > 1 else {}), problems


def _targets(dataset: RawDataset, texts: Sequence[RawText]) -> Record:
    if dataset.texts == "caption":
        return {}
    ids = [text.id for text in texts]
    if dataset.texts == "question":
        return question_targets(ids, [text.scores for text in texts], [a for text in texts for a in text.answers])
    return label_targets(ids, [text.label for text in texts])
