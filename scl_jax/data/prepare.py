r"""Prepares data sets: reads and checks files, or draws toy scenes, and writes array_record shards.

    python -m scl_jax.data.prepare --dataset=toy_world --out=data --train_tokenizer=data/tokenizer
    python -m scl_jax.data.prepare --dataset=own_data/pets --captions=pets.jsonl --media=pets --out=data
    python -m scl_jax.data.prepare --dataset=own_data/pets --media=pets --out=data    (a.txt beside a.jpg in pets)
    python -m scl_jax.data.prepare --dataset=own_data/clips --captions=train=a.csv --captions=test=b.csv --media=clips
    python -m scl_jax.data.prepare --dataset=own_data/nlvr --captions=nlvr/dev/dev.json --format=nlvr \
        --media=nlvr/dev/images

    python -m scl_jax.data.prepare --dataset=coco/captions --source=downloads/coco --out=data --skip_broken

Caption files and their columns: scl_jax/data/builders/caption_files.py. Public data sets, and what lies in the folder
that `--source` names: docs/data.md. A data set is written beside its place and moved there when it is complete.
Generated and public data sets that are there already are kept; your own are an error, as their files may have changed.
`--overwrite` replaces all. Of a public data set whose preparation was interrupted, finished splits are kept beside its
place, in `.preparing-…`, and not made again.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags, logging
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scl_jax.data import builders
from scl_jax.data.builders.problems import LEFT_OUT_FILE, BrokenRecordsError
from scl_jax.data.tokens import check_vocab_size, load_tokenizer, train_tokenizer

_FLAGS = flags.FLAGS
_ALL_CONFIGS = {"toy_world": ("images", "videos"), "own_data": ("default",)}  # of a data set named without config
_SHOWN_PROBLEMS = 20
_NO_COUNTS = (None, None)

flags.DEFINE_list(
    "dataset", [], "Data sets, separated by commas: toy_world, toy_world/images, own_data/<name>, coco/captions."
)
flags.DEFINE_string("out", "data", "Folder of the shards; config.data.dir of the runs that read them.")
flags.DEFINE_bool("overwrite", False, "Replace data sets and tokenizers that are there already.")
flags.DEFINE_string("train_tokenizer", None, "Train a byte-level BPE on the training captions and write this folder.")
flags.DEFINE_integer("vocab_size", 8192, "Largest vocabulary of the trained tokenizer.")
# options of builders; only those given are passed on
flags.DEFINE_multi_string(
    "captions",
    None,
    "own_data: caption file or pattern, or split=file; may be repeated. Without it, name.txt beside name.jpg in the "
    "folder --media holds the captions, one a line.",
)
flags.DEFINE_string("media", None, "own_data: folder of the images or clips; paths in caption files start there.")
flags.DEFINE_string("source", None, "Public data sets: folder of the owner's files, or of ViLT's arrow files.")
flags.DEFINE_list("splits", None, "Public data sets: only these splits.")
flags.DEFINE_integer(
    "answers_at_least",
    None,
    "vqav2: questions of which an answer of the vocabulary is the most common one; by default 9.",
)
flags.DEFINE_string("format", None, "own_data: auto, jsonl, csv, arrow or nlvr.")
flags.DEFINE_string("split_by", None, "own_data: column whose equal values stay in one split.")
flags.DEFINE_bool("skip_broken", None, "Leave broken records out instead of stopping (own_data and public data sets).")
flags.DEFINE_integer("workers", None, "Threads that check files (own_data and public data sets).")
flags.DEFINE_float("validation", None, "own_data: share of the validation split; toy_world: its number of scenes.")
flags.DEFINE_float("test", None, "own_data: share of the test split; toy_world: its number of scenes.")
flags.DEFINE_integer("train", None, "toy_world: number of training scenes.")
flags.DEFINE_integer("seed", None, "toy_world: seed of all scenes.")
_OPTIONS = (
    "captions", "media", "source", "splits", "format", "split_by", "skip_broken", "workers",
    "validation", "test", "train", "seed", "answers_at_least",
)  # fmt: skip


def prepare_dataset(name: str, out: Path, *, overwrite: bool, options: dict[str, Any]) -> tuple[Path, bool]:
    """Prepares one data set and returns its folder and whether it was written (else kept as it was).

    It is built in a folder beside and then moved, so that a failure leaves what was there before. The list of records
    left out goes into the data set's folder or, when they stopped the preparation, beside it.
    """
    builder_name, _, config_name = name.partition("/")
    place = out / builder_name / config_name
    there = _prepared(name, out)
    if there and not overwrite:
        if builder_name == "own_data":
            raise ValueError(f"{name} is already prepared in {there[-1].parent}; pass --overwrite to replace it")
        return builders.prepare(name, out, **options), False
    out.mkdir(parents=True, exist_ok=True)
    keeps_splits = _is_public(builder_name)
    if keeps_splits:
        staging = out / f".preparing-{builder_name}-{config_name}"
    else:
        staging = Path(tempfile.mkdtemp(prefix=".preparing-", dir=out))
    report = staging / builder_name / config_name / LEFT_OUT_FILE
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces the folder that is about to be moved
            written = builders.prepare(name, staging, **options)
        if report.exists():
            report.rename(written / LEFT_OUT_FILE)
        place.mkdir(parents=True, exist_ok=True)
        target = place / written.name
        if target.exists():
            target.rename(staging / "replaced")
        written.rename(target)
        (place / LEFT_OUT_FILE).unlink(missing_ok=True)  # of an attempt that failed
        keeps_splits = False
        return target, True
    except BrokenRecordsError:
        place.mkdir(parents=True, exist_ok=True)
        report.rename(place / LEFT_OUT_FILE)
        raise
    finally:
        if not keeps_splits:
            shutil.rmtree(staging, ignore_errors=True)


def _prepared(name: str, out: Path) -> list[Path]:
    """What describes a data set that is there already; one file a version."""
    return sorted((out / name).glob("*.*.*/dataset_info.json"))


def _is_public(builder_name: str) -> bool:
    return hasattr(builders.builder_module(builder_name), "DATASET")


def check_tokenizer(folder: Path, vocab_size: int, *, written: bool, overwrite: bool) -> None:
    """Raises ValueError where a tokenizer cannot go to a folder, as far as that is known before it is trained.

    written: whether a data set is about to be written; else a tokenizer that is there may turn out to be the same.
    """
    check_vocab_size(vocab_size)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--train_tokenizer={folder} is a file; name a folder")
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"--train_tokenizer: {folder} holds other files; choose another folder, or pass --overwrite")
    if written:
        raise ValueError(
            f"--train_tokenizer: {folder} holds a tokenizer already; choose another folder, keep that tokenizer by "
            "leaving --train_tokenizer out, or pass --overwrite"
        )


def write_tokenizer(captions: list[str], folder: Path, vocab_size: int, *, overwrite: bool) -> int:
    """Trains a tokenizer on captions and returns its vocabulary size; another one already there is an error."""
    with tempfile.TemporaryDirectory() as scratch:
        trained = train_tokenizer(captions, scratch, vocab_size)
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            new, old = (Path(path) / "tokenizer.json" for path in (scratch, folder))
            if not old.exists() or new.read_bytes() != old.read_bytes():
                raise ValueError(f"{folder} holds another tokenizer or other files; pass --overwrite or choose another")
        trained.save(folder)
    return load_tokenizer(folder).vocab_size


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    console = Console(stderr=True)
    logging.set_verbosity(logging.ERROR)  # TFDS reports every file it touches
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        if len(argv) > 1:
            raise ValueError(f"unknown arguments: {' '.join(argv[1:])}; flags begin with --")
        names, out = _dataset_names(_FLAGS.dataset), Path(_FLAGS.out).expanduser()
        folder = Path(_FLAGS.train_tokenizer or "").expanduser()
        if _FLAGS.train_tokenizer:
            written = not all(_prepared(name, out) for name in names)
            check_tokenizer(folder, _FLAGS.vocab_size, written=written, overwrite=_FLAGS.overwrite)
        captions = _prepare_all(names, out, console)
        if _FLAGS.train_tokenizer:
            size = write_tokenizer(captions, folder, _FLAGS.vocab_size, overwrite=_FLAGS.overwrite)
            console.print(f"tokenizer of {size:,} tokens: {folder}", soft_wrap=True)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


def _prepare_all(names: list[str], out: Path, console: Console) -> list[str]:
    """Prepares the data sets one after the other and returns all their training captions."""
    options = _options(names)
    captions: list[str] = []
    for name in names:
        try:
            folder, written = prepare_dataset(name, out, overwrite=_FLAGS.overwrite, options=options[name])
        except BrokenRecordsError:
            _show_left_out(out / name / LEFT_OUT_FILE, console)
            raise
        console.print(f"{name}: {'written to' if written else 'already there, kept:'} {folder}", soft_wrap=True)
        captions += _summarise(name, out, folder, console)
        _show_left_out(folder / LEFT_OUT_FILE, console)
    return captions


def _dataset_names(given: list[str]) -> list[str]:
    if not given:
        raise ValueError("name a data set: --dataset=toy_world or --dataset=own_data/<name>")
    names = []
    for name in given:
        names += [name] if "/" in name else [f"{name}/{config}" for config in _ALL_CONFIGS.get(name, ("default",))]
    return names


def _options(names: list[str]) -> dict[str, dict[str, Any]]:
    """The options given on the command line, for each data set those that its builder knows."""
    given = {option: _FLAGS[option].value for option in _OPTIONS if _FLAGS[option].value is not None}
    counts = {option: int(value) for option, value in given.items() if isinstance(value, float) and value >= 1}
    given |= counts  # numbers of scenes; shares are below 1
    options = {}
    for name in names:
        make_builder = builders.builder_module(name.partition("/")[0]).make_builder
        known = inspect.signature(make_builder).parameters
        options[name] = {option: value for option, value in given.items() if option in known}
    unknown = sorted(set(given).difference(*options.values()))
    if unknown:
        raise ValueError(f"{', '.join(names)}: no such option {', '.join(f'--{option}' for option in unknown)}")
    return options


def _summarise(name: str, out: Path, folder: Path, console: Console) -> list[str]:
    """Reads the shards back once, prints what they hold beside what is published, and returns the training captions."""
    train_captions: list[str] = []
    info = tfds.builder_from_directory(str(folder)).info
    dataset = getattr(builders.builder_module(name.partition("/")[0]), "DATASET", None)
    table = Table("split", "items", "captions", "MB", title=name)
    for column in ("published items", "captions") if dataset else ():
        table.add_column(column)
    for split in info.splits:
        source = builders.open_source(name, split, out)
        items = captions = size = 0
        for index in range(len(source)):
            record = source[index]
            items, captions, size = items + 1, captions + len(record["captions"]), size + len(record["media"])
            if split == "train":
                train_captions += record["captions"]
        published = dataset.published.get(split, _NO_COUNTS) if dataset else ()
        shown = ("–" if count is None else f"{count:,}" for count in published)
        table.add_row(split, f"{items:,}", f"{captions:,}", f"{size / 1e6:,.1f}", *shown)
    console.print(table)
    for split, notes in (info.metadata or {}).get("notes", {}).items():
        for note, count in notes.items():
            console.print(f"{split}: {count:,} {escape(note)}", soft_wrap=True)
    return train_captions


def _show_left_out(report: Path, console: Console) -> None:
    if not report.exists():
        return
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    for line in lines[:_SHOWN_PROBLEMS]:
        place = f"{line['file']}, line {line['line']}" if line["line"] else line["file"]
        console.print(f"[yellow]left out[/]: {escape(place)}: {escape(line['reason'])}", soft_wrap=True)
    console.print(f"left out in all: {len(lines):,} (see {report})", soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
