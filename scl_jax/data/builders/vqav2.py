"""VQA v2, questions about COCO images, as "vqav2/questions".

    v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json
    v2_mscoco_{train2014,val2014}_annotations.json
    train2014/COCO_train2014_000000000009.jpg  val2014/…  test2015/…

`train` is the owner's train and all of val but 1,000 images, which are `validation`, as in ViLT and METER; which 1,000
is decided by a hash of the image (ViLT drew them at random when its files were written). The answers are those that are
the most common one of at least 9 questions of train and val (`answers_at_least`): 3,129. Training questions without any
of them are left out and counted; evaluation keeps them. A record is an image with all its questions.

Arrow files: vqav2_{train,trainable_val,rest_val,test,test-dev}.arrow. Their answers keep the numbers that they have
there, and the ten raw answers of a question are not in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from scl_jax.data.builders.caption_files import ArrowCell, Place, Problem, UnusableError
from scl_jax.data.builders.raw import (
    Counts,
    Entries,
    Note,
    RawDataset,
    RawItem,
    RawPreparation,
    RawSplits,
    RawText,
    raw_builder,
)
from scl_jax.data.builders.raw_files import Located, arrow_rows, note_once, numbered, read_json, required, value
from scl_jax.data.vqa_answers import ANSWERS_PER_QUESTION, answer_vocabulary, soft_targets

VALIDATION_IMAGES = 1000
AT_LEAST = 9  # questions of which an answer of the vocabulary is the most common one
_OUTSIDE = "questions: none of their answers is the most common one of at least {} questions (--answers_at_least)"
_ARROW_FILES = {
    "train": ("vqav2_train.arrow", "vqav2_trainable_val.arrow"),
    "validation": ("vqav2_rest_val.arrow",),
    "test": ("vqav2_test.arrow",),
    "test_dev": ("vqav2_test-dev.arrow",),
}


def read_tree(source: Path, at_least: int = AT_LEAST) -> RawSplits:
    """Questions joined with their answers and by image; the vocabulary as `make_builder` says."""
    answers = {part: _read_answers(source, part) for part in ("train2014", "val2014")}
    classes = tuple(
        answer_vocabulary([common for part in answers.values() for common, _ in part.values()], at_least=at_least)
    )
    outside = Note(_OUTSIDE.format(at_least))
    label_of = {answer: label for label, answer in enumerate(classes)}
    train, val = (_Part(source, part, answers[part], label_of) for part in answers)

    def training() -> Entries:
        held_back = val.held_back()
        yield from train.entries(outside=outside)
        yield from val.entries(lambda image: image not in held_back, outside=outside)

    def validation() -> Entries:
        held_back = val.held_back()
        yield from val.entries(lambda image: image in held_back)

    tests = {"test": "test2015", "test_dev": "test-dev2015"}
    entries: dict[str, Entries] = {"train": training(), "validation": validation()}
    return RawSplits(entries | {split: _Part(source, part).entries() for split, part in tests.items()}, classes)


def _read_answers(source: Path, part: str) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Of every question, the most common answer and the ten answers."""
    file = required(source, f"v2_mscoco_{part}_annotations.json")
    found: dict[int, tuple[str, tuple[str, ...]]] = {}
    seen: dict[str, Place] = {}
    try:
        for place, entry in numbered(file, read_json(file, "annotations")):
            number = _number(entry, "question_id")
            note_once(seen, "question_id", str(number), place)
            found[number] = (
                value(entry, "multiple_choice_answer", str),
                tuple(value(answer, "answer", str) for answer in value(entry, "answers", list)),
            )
    except UnusableError as error:
        raise ValueError(f"{file}: an annotation has {error}; is it the owner's file?") from error
    return found


def _number(entry: Any, key: str) -> int:
    """A whole number from 0 on; UnusableError for anything else, such as true."""
    number = value(entry, key, int)
    if isinstance(number, bool) or number < 0:
        raise UnusableError(f"{key} {number!r}, which is no whole number from 0 on")
    return number


@dataclass(frozen=True)
class _Part:
    """The questions of one file of the owner's; without answers for test."""

    source: Path
    part: str
    answers: dict[int, tuple[str, tuple[str, ...]]] | None = None
    label_of: dict[str, int] | None = None

    def _questions(self) -> Iterator[tuple[Place, Any]]:
        file = required(self.source, f"v2_OpenEnded_mscoco_{self.part}_questions.json")
        yield from numbered(file, read_json(file, "questions"))

    def held_back(self) -> frozenset[int]:
        """The images of `validation`."""
        found = (entry.get("image_id") for _, entry in self._questions() if isinstance(entry, dict))
        images = {image for image in found if type(image) is int}  # `entries` says what is wrong with others
        ordered = sorted(images, key=lambda image: hashlib.sha256(str(image).encode()).digest())
        return frozenset(ordered[:VALIDATION_IMAGES])

    def entries(self, wanted: Callable[[int], bool] = lambda image: True, outside: Note | None = None) -> Entries:
        """The images that are wanted, with their questions; `outside` instead of one without a known answer."""
        places: dict[int, Place] = {}
        texts: dict[int, list[RawText]] = {}
        seen: dict[str, Place] = {}
        for place, entry in self._questions():
            try:
                image = _number(entry, "image_id")
                if not wanted(image):
                    continue
                text = self._text(entry)
                note_once(seen, "question_id", text.id, place)
            except UnusableError as error:
                yield Problem(place, str(error))
                continue
            if outside and not text.scores:
                yield outside
                continue
            places.setdefault(image, place)
            texts.setdefault(image, []).append(text)
        folder = self.part.replace("-dev", "")
        for image, place in places.items():
            medium = Located(self.source, (f"{folder}/COCO_{folder}_{image:012d}.jpg",))
            yield RawItem(place, str(image), (medium,), tuple(texts[image]))

    def _text(self, entry: dict[str, Any]) -> RawText:
        number = _number(entry, "question_id")
        question = value(entry, "question", object)
        if self.answers is None:
            return RawText(question, str(number))
        if number not in self.answers:
            raise UnusableError(f"question {number} has no annotation in v2_mscoco_{self.part}_annotations.json")
        ten = self.answers[number][1]
        if len(ten) != ANSWERS_PER_QUESTION:
            raise UnusableError(f"question {number} has {len(ten)} answers, not {ANSWERS_PER_QUESTION}")
        return RawText(question, str(number), scores=soft_targets(ten, self.label_of or {}), answers=ten)


# ---- arrow files ----


def read_arrow(source: Path) -> RawSplits:
    """The same from ViLT's columns; the classes are those that any row names."""
    present = [name for names in _ARROW_FILES.values() for name in names if (source / name).exists()]
    classes = _arrow_classes(source, present)
    return RawSplits({split: _arrow_entries(source, names) for split, names in _ARROW_FILES.items()}, classes)


def _arrow_classes(source: Path, names: Sequence[str]) -> tuple[str, ...]:
    answer_of: dict[int, str] = {}
    for _, _, values in arrow_rows(source, names, ("image",)) if names else ():
        for labels, answers in zip(values.get("answer_labels") or (), values.get("answers") or (), strict=False):
            answer_of.update(zip(labels or (), answers or (), strict=False))
    unnamed = sorted(set(range(max(answer_of, default=-1) + 1)) - set(answer_of))
    if unnamed:
        raise ValueError(f"{source}: no question has the answers {unnamed[:5]} …; are all vqav2_*.arrow files there?")
    return tuple(answer_of[label] for label in range(len(answer_of)))


def _arrow_entries(source: Path, names: Sequence[str]) -> Iterator[RawItem]:
    columns = ("image", "questions", "answer_labels", "answer_scores", "image_id", "question_id")
    for name in names:
        for file, row, values in arrow_rows(source, (name,), columns):
            count = len(values["questions"])
            targets = zip(_lists(values["answer_labels"], count), _lists(values["answer_scores"], count), strict=True)
            texts = tuple(
                RawText(question, str(number), scores=dict(zip(labels, scores, strict=True)))
                for question, number, (labels, scores) in zip(
                    values["questions"], values["question_id"], targets, strict=True
                )
            )
            yield RawItem(Place(str(file), row + 1), str(values["image_id"]), (ArrowCell(file, row),), texts)


def _lists(column: Iterable[Any] | None, count: int) -> list[list[Any]]:
    lists = list(column or ())
    return [entry or [] for entry in lists] + [[]] * (count - len(lists))


DATASET = RawDataset(
    name="vqav2",
    config="questions",
    read_tree=read_tree,
    read_arrow=read_arrow,
    published={
        "train": Counts(122_287, None),
        "validation": Counts(1_000, None),
        "test": Counts(81_434, 447_793),
        "test_dev": Counts(None, 107_394),
    },
    texts="question",
)


def make_builder(
    config_name: str,
    data_dir: str,
    *,
    source: str = "",
    splits: Sequence[str] = (),
    skip_broken: bool = False,
    workers: int = 4,
    answers_at_least: int = AT_LEAST,
) -> RawPreparation:
    """As of every public data set.

    answers_at_least: questions of which an answer of the vocabulary is the most common one; the answers of arrow files
    are numbered already.
    """
    if answers_at_least < 1:
        raise ValueError(f"vqav2: answers_at_least={answers_at_least}; at least 1 is needed")
    make = raw_builder(replace(DATASET, read_tree=partial(read_tree, at_least=answers_at_least)))
    return make(config_name, data_dir, source=source, splits=splits, skip_broken=skip_broken, workers=workers)
