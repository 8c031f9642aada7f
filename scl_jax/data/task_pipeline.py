"""Examples of downstream tasks: every text of every item, with the item's pixels and the text's target.

The journey is that of pipeline.py; only what an example is differs: not an item with one of its texts, but a text with
its item, so that an epoch shows every question, statement, hypothesis or caption once. Beside the fields of
`scl_jax.types.Batch`, a batch has those of this table that the data set knows.

| key | shape | of |
|---|---|---|
| example_id | (B,) int32 | all: the place of the text among the texts of the split |
| second_pixels | (B, F, H, W, 3) uint8 | two-image sets; `pixels` is the left image |
| label | (B,) int32 | statements and hypotheses; -1 where the split has no labels |
| answer_scores | (B, K) float32 | questions: soft targets from 0 to 1; all 0 where the split has no answers |

Axes: B rows of this process's batch, F frames, H W pixels, K classes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import SupportsIndex

import grain
import numpy as np
from jaxtyping import Float

from scl_jax.data import builders
from scl_jax.data.builders.targets import why_inconsistent
from scl_jax.data.pipeline import (
    Config,
    EvaluationEncoder,
    EvaluationRows,
    NumpyBatch,
    RowsOf,
    Tokenizer,
    TrainExample,
    endless_examples,
    mixed_batches,
)
from scl_jax.data.records import NOTHING, LeftOut, Record, Records
from scl_jax.data.vqa_answers import ANSWERS_PER_QUESTION


def class_names(names: Sequence[str], data_dir: str, split: str = "train") -> tuple[str, ...]:
    """The labels or answers that these prepared data sets tell apart; none for data sets of captions.

    Raises:
        ValueError: two of the data sets number different classes.
        FileNotFoundError: a data set is not prepared.
    """
    found = {name: builders.open_source(name, split, data_dir, whole=False).classes for name in names if name}
    if len(set(found.values())) > 1:
        sizes = ", ".join(f"{name} {len(classes)}" for name, classes in found.items())
        raise ValueError(f"data sets of one stream number their classes differently ({sizes}); train them apart")
    return next(iter(found.values()), ())


@dataclass(frozen=True)
class Example:
    """One text of a record: its number there, and its place among the texts of the split."""

    record: Record
    number: int
    example_id: int

    @property
    def text(self) -> str:
        """The question, statement, hypothesis or caption; RecordError when it is empty."""
        return self.record.caption(self.number)

    @property
    def text_id(self) -> str:
        """The owner's id of the text, or its place among all texts where it has none."""
        ids = self.record.extra.get("text_ids")
        return ids[self.number] if ids else str(self.example_id)

    @property
    def answers(self) -> list[str]:
        """The ten answers that people gave to a question; none where they are not known."""
        first = self.number * ANSWERS_PER_QUESTION
        return list(self.record.extra.get("answers", ())[first : first + ANSWERS_PER_QUESTION])

    def targets(self, classes: int) -> NumpyBatch:
        """The fields of the table above except `second_pixels`."""
        extra = self.record.extra
        fields: NumpyBatch = {"example_id": np.int32(self.example_id)}
        if "labels" in extra:
            fields["label"] = np.int32(extra["labels"][self.number])
        if "answer_counts" in extra:
            fields["answer_scores"] = self._answer_scores(classes)
        return fields

    def _answer_scores(self, classes: int) -> Float[np.ndarray, " K"]:
        extra = self.record.extra
        ends = np.cumsum(extra["answer_counts"])
        mine = slice(ends[self.number] - extra["answer_counts"][self.number], ends[self.number])
        scores = np.zeros(classes, np.float32)
        scores[extra["answer_labels"][mine]] = extra["answer_scores"][mine]
        return scores


class Examples:
    """Random access to the texts of several data sets with their records, for Grain.

    Raises:
        ValueError: no data set is named, they hold no text, or they number different classes.
    """

    def __init__(self, names: Sequence[str], split: str, data_dir: str, left_out: LeftOut = NOTHING):
        self._records = Records(names, split, data_dir, left_out)
        self.classes = class_names(names, data_dir, split)
        self._ends = list(accumulate(self._records.text_counts()))
        if len(self) == 0:
            raise ValueError(f"split {split} of {', '.join(names)} holds no text; prepare it again")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Example:
        example_id = index.__index__()
        item = bisect_right(self._ends, example_id)
        first = self._ends[item - 1] if item else 0
        record = self._records[item]
        if reason := why_inconsistent(
            {"captions": record.captions, **record.extra}, len(self.classes), self._ends[item] - first
        ):
            raise record.error(reason, "prepare the data set again")
        return Example(record, example_id - first, example_id)


def task_dataset(
    data: Config,
    *,
    seed: int,
    tokenizer: Tokenizer,
    rows_of: RowsOf = range,
    left_out: Mapping[str, LeftOut] = NOTHING,
) -> grain.IterDataset[NumpyBatch]:
    """The endless training batches of this process for a downstream task (`data` is `config.data`).

    As `pipeline.train_dataset`: same streams, order, rows of a process, and state of one number. An epoch shows every
    text once. The two images of an example are augmented each by its own draw.

    Raises:
        ValueError: as `pipeline.train_dataset` and `Examples`.
    """

    def make_examples(name: str, rng: np.random.SeedSequence) -> grain.MapDataset[NumpyBatch]:
        stream = data[name]
        examples = Examples(stream.datasets, "train", data.dir, left_out.get(name, NOTHING))
        make = _TrainTask(TrainExample(stream, data.text_length, tokenizer), len(examples.classes))
        return endless_examples(examples, make, rng)

    return mixed_batches(data, make_examples, seed, rows_of)


@dataclass(frozen=True)
class _TrainTask:
    """Example and random generator → one training example."""

    make: TrainExample
    classes: int

    def __call__(self, example: Example, rng: np.random.Generator) -> NumpyBatch:
        record = example.record
        fields = self.make.with_text(record, example.number, rng)
        if "second_media" in record.extra:
            fields["second_pixels"] = self.make.pixels(record, record.extra["second_media"], example.text, rng)
        return {**fields, **example.targets(self.classes)}


def task_evaluation_set(
    stream_config: Config,
    dataset_names: Sequence[str],
    split: str,
    *,
    data_dir: str,
    text_length: int,
    tokenizer: Tokenizer,
    batch_size: int,
    max_items: int = 0,
    rows_of: RowsOf = range,
    threads: int = 8,
    left_out: LeftOut = NOTHING,
) -> TaskEvaluationSet:
    """Opens a split of a downstream task, at the frames and image size of `stream_config`.

    batch_size: of one batch over all processes; this process gets the rows that `rows_of` names. max_items: that
    many texts, evenly spaced over the split; 0 for all.

    Raises:
        ValueError: as `Examples`.
    """
    rows = EvaluationRows(batch_size, np.asarray(rows_of(batch_size)), threads)
    encode = EvaluationEncoder(stream_config.image_size, stream_config.frames, text_length, tokenizer)
    return TaskEvaluationSet(Examples(dataset_names, split, data_dir, left_out), max_items, encode, rows)


class TaskEvaluationSet:
    """A split of a downstream task: its texts with their items, each exactly once and in order.

    Examples count from 0 to num_examples - 1 within this set; `example_id` is this number. All batches have the same
    shape; padding rows have weight 0 and ids -1.
    """

    classes: tuple[str, ...]

    def __init__(self, examples: Examples, max_items: int, encode: EvaluationEncoder, rows: EvaluationRows):
        self._examples, self._encode, self._rows = examples, encode, rows
        self.classes = examples.classes
        self.num_examples = min(max_items, len(examples)) if max_items else len(examples)

    def batches(self) -> Iterator[NumpyBatch]:
        """Batches with all fields of `scl_jax.types.Batch` and of the table above."""
        return self._rows.batches(self.num_examples, self._fields)

    def text(self, example: int) -> str:
        """The question, statement, hypothesis or caption."""
        return self._example(example).text

    def text_id(self, example: int) -> str:
        """The owner's id of the text: VQA's question_id, NLVR2's identifier, SNLI-VE's pairID."""
        return self._example(example).text_id

    def answers(self, example: int) -> list[str]:
        """The ten answers that people gave to a question; none where they are not known."""
        return self._example(example).answers

    def _example(self, example: int) -> Example:
        return self._examples[example * len(self._examples) // self.num_examples]

    def _fields(self, number: int) -> NumpyBatch:
        example = self._example(number)
        record = example.record
        fields = {
            "pixels": self._encode.pixels(record, record.media),
            **self._encode.tokens(example.text),
            "item_id": np.int32(record.item_id),
            **example.targets(len(self.classes)),
            "example_id": np.int32(number),
        }
        if "second_media" in record.extra:
            fields["second_pixels"] = self._encode.pixels(record, record.extra["second_media"])
        return fields
