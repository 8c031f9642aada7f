r"""Predictions as the owners of the data sets take them, and a check before they are handed in.

    vqa          JSON for EvalAI: [{"question_id": 1, "answer": "yes"}, …]
    nlvr2        CSV without a heading: test1-0-0-0,True
    entailment   CSV: pairID,label
    retrieval    JSON lines: a query, and the best answers with their scores

Check a file for EvalAI against the questions of the split as they are published:

    python -m scl_jax.evaluation.predictions runs/vqa/predictions/vqa_images_test_dev.json \
        --questions=v2_OpenEnded_mscoco_test-dev2015_questions.json
"""

from __future__ import annotations

import csv
import json
import sys
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from scl_jax.data.pipeline import EvaluationSet
from scl_jax.evaluation.classification import Predictions
from scl_jax.evaluation.ranking import Ranking, Top


class SubmissionError(ValueError):
    """A file of predictions that would be refused; the message lists what is wrong."""


def write_answers(predictions: Predictions, file: Path) -> Path:
    """Answers to visual questions for EvalAI; warns of what it would refuse, such as a question without a number.

    They are written all the same: an hour of evaluation is in them, and a file can be mended.
    """
    ids = [int(text_id) if text_id.isascii() and text_id.isdigit() else text_id for text_id in predictions.ids]
    answers = [
        {"question_id": number, "answer": answer} for number, answer in zip(ids, predictions.classes, strict=True)
    ]
    _write(file, json.dumps(answers))
    try:
        check_answers(answers, [number for number in ids if isinstance(number, int)])
    except SubmissionError as error:
        warnings.warn(f"{file}: {error}", stacklevel=2)
    return file


def check_answers(answers: Any, question_ids: Collection[int]) -> None:
    """Whether a parsed file of answers is what EvalAI takes: every question of the split answered exactly once.

    Raises:
        SubmissionError: lists everything that is wrong.
    """
    if not isinstance(answers, list):
        raise SubmissionError("a list of answers is wanted, [{…}, …]")
    problems, given = [], Counter()
    for place, answer in enumerate(answers):
        if not isinstance(answer, dict) or set(answer) != {"question_id", "answer"}:
            problems.append(f"entry {place}: exactly the keys question_id and answer are wanted, not {answer!r:.80}")
            continue
        number, words = answer["question_id"], answer["answer"]
        if type(number) is not int:
            problems.append(f"entry {place}: question_id {number!r} is no whole number")
        else:
            given[number] += 1
        if not isinstance(words, str) or not words.strip():
            problems.append(f"entry {place} (question {number}): the answer {words!r} is no text")
    expected = Counter(question_ids)
    for what, numbers in (
        ("answered more than once", [number for number, count in given.items() if count > 1]),
        ("not answered", sorted(set(expected) - set(given))),
        ("answered, but not of this split", sorted(set(given) - set(expected))),
        ("more than once in the split", [number for number, count in expected.items() if count > 1]),
    ):
        if numbers:
            problems.append(f"{len(numbers)} question(s) {what}, such as {', '.join(map(str, numbers[:3]))}")
    if problems:
        shown = problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise SubmissionError("EvalAI would refuse these answers:\n  " + "\n  ".join(shown))


def write_statements(predictions: Predictions, file: Path) -> Path:
    """NLVR2's CSV, read by its official script: an identifier and True or False a line, no heading."""
    rows = [(text_id, word.capitalize()) for text_id, word in zip(predictions.ids, predictions.classes, strict=True)]
    return _write_csv(file, rows)


def write_entailment(predictions: Predictions, file: Path) -> Path:
    """A CSV of pairID and label."""
    return _write_csv(file, [("pairID", "label"), *zip(predictions.ids, predictions.classes, strict=True)])


def write_rankings(ranking: Ranking, examples: EvaluationSet, file: Path) -> Path:
    """The best answers of every text and of every item, a JSON object a line; texts and items go by number, from 0."""
    lines = [
        {"text": text, "caption": examples.captions[text], "item": int(examples.caption_item[text]), **best}
        for text, best in enumerate(_best(ranking.text_to_item, "items"))
    ]
    lines += [
        {"item": item, "name": examples.name(item), **best}
        for item, best in enumerate(_best(ranking.item_to_text, "texts"))
    ]
    return _write(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _best(top: Top, what: str) -> Sequence[dict[str, list]]:
    return [
        {what: ids.tolist(), "scores": [round(float(score), 4) for score in scores]}
        for ids, scores in zip(top.ids, top.scores, strict=True)
    ]


def _write_csv(file: Path, rows: Sequence[tuple[str, ...]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)
    return file


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def main() -> None:
    """The command."""
    program = "python -m scl_jax.evaluation.predictions"
    parser = ArgumentParser(prog=program, description="Checks answers for EvalAI's VQA challenge.")
    parser.add_argument("answers", type=Path, help="the file to hand in")
    parser.add_argument("--questions", type=Path, required=True, help="the questions of the split, as published")
    arguments = parser.parse_args()
    try:
        answers = _read_json(arguments.answers)
        try:
            numbers = [question["question_id"] for question in _read_json(arguments.questions)["questions"]]
            if not all(type(number) is int for number in numbers):
                raise TypeError
        except (KeyError, TypeError) as error:
            raise ValueError(
                f'{arguments.questions}: {{"questions": [{{"question_id": …}}, …]}} is expected'
            ) from error
        check_answers(answers, numbers)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.answers}: {len(answers):,} answers, one for each question")


if __name__ == "__main__":
    main()
