"""What the data sets of downstream tasks hold besides id, media and captions, and how it is written.

`captions` are the texts of an item in every data set: captions, questions, statements or hypotheses. Everything here
runs parallel to them, and is flat because TFDS features are. Class names, and the number of texts of each record, lie
in the data set's metadata, so that a run knows its examples without reading every record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from scl_jax.data.builders import bytes_feature, record_features
from scl_jax.data.vqa_answers import ANSWERS_PER_QUESTION

STATEMENT_CLASSES = ("false", "true")
ENTAILMENT_CLASSES = ("contradiction", "neutral", "entailment")  # METER's order
UNKNOWN = -1  # the label of a text that has none

Record = dict[str, Any]


def question_features() -> tfds.features.FeaturesDict:
    """An image with questions: ids, soft targets as the classes of every question one after the other, raw answers.

    answer_counts (n,) says how many of answer_labels and answer_scores (A,) belong to each of the n questions. answers
    are the ten raw ones of each question, or none at all where they are not known.
    """
    return record_features(
        text_ids=_texts(),
        answer_labels=_integers(),
        answer_scores=tfds.features.Tensor(shape=(None,), dtype=np.float32),
        answer_counts=_integers(),
        answers=_texts(),
    )


def label_features(*, two_images: bool = False) -> tfds.features.FeaturesDict:
    """An image, or two, with texts that have a class each; UNKNOWN for none."""
    second = {"second_media": bytes_feature()} if two_images else {}
    return record_features(text_ids=_texts(), labels=_integers(), **second)


def question_targets(
    text_ids: Sequence[str], targets: Sequence[Mapping[int, float]], answers: Sequence[str] = ()
) -> Record:
    """The features of `question_features` from the soft targets of each question."""
    return {
        "text_ids": list(text_ids),
        "answer_labels": np.asarray([label for target in targets for label in target], np.int32),
        "answer_scores": np.asarray([score for target in targets for score in target.values()], np.float32),
        "answer_counts": np.asarray([len(target) for target in targets], np.int32),
        "answers": list(answers),
    }


def label_targets(text_ids: Sequence[str], labels: Sequence[int]) -> Record:
    """The features of `label_features`, without the second image."""
    return {"text_ids": list(text_ids), "labels": np.asarray(labels, np.int32)}


def why_inconsistent(record: Mapping[str, Any], classes: int, noted: int | None = None) -> str:
    """Why the texts of a record and what runs parallel to them cannot be used; "" where they can.

    classes: of the data set. noted: how many texts its metadata promises, None where they promise nothing.
    """
    captions = record["captions"]
    count = len(captions)
    empty = [number for number, caption in enumerate(captions) if not caption.strip()]
    if not captions or empty:
        return f"caption {empty[0]} is empty" if empty else "caption 0 is empty: there is none"
    if noted is not None and noted != count:
        return f"{count} texts, but the metadata of its data set promise {noted}"
    for key in ("text_ids", "labels", "answer_counts"):
        if key in record and len(record[key]) != count:
            return f"{len(record[key])} {key} for {count} texts"
    if "labels" in record and not all(UNKNOWN <= label < classes for label in record["labels"]):
        return f"a label that is none of the {classes} classes"
    return _why_no_answers(record, classes) if "answer_counts" in record else ""


def _why_no_answers(record: Mapping[str, Any], classes: int) -> str:
    labels, counts = record["answer_labels"], record["answer_counts"]
    answers = len(record["answers"])
    if answers not in (0, ANSWERS_PER_QUESTION * len(counts)):
        return f"{answers} raw answers for {len(counts)} questions, not {ANSWERS_PER_QUESTION} each"
    if min(counts) < 0 or not sum(counts) == len(labels) == len(record["answer_scores"]):
        return f"{len(labels)} answers with {len(record['answer_scores'])} scores for questions that have {sum(counts)}"
    if not all(0 <= label < classes for label in labels):
        return f"an answer that is none of the {classes} classes"
    if not all(text_id.isascii() and text_id.isdecimal() for text_id in record["text_ids"]):
        return "a question whose id is no whole number"
    return ""


def with_keys(records: Iterable[Record], metadata: Any, split: str) -> Iterator[tuple[int, Record]]:
    """Numbers the records for TFDS and notes in the metadata how many texts each has."""
    counts = metadata.setdefault("texts", {}).setdefault(split, [])
    for key, record in enumerate(records):
        counts.append(len(record["captions"]))
        yield key, record


def _texts() -> tfds.features.Sequence:
    return tfds.features.Sequence(tfds.features.Text())


def _integers() -> tfds.features.Tensor:
    return tfds.features.Tensor(shape=(None,), dtype=np.int32)
