"""VQA's answers: the official normalisation, the official accuracy, and the soft targets of training.

The rules are those published at https://visualqa.org/evaluation.html (Antol et al., ICCV 2015; Goyal et al., CVPR
2017), in the form of the challenge's evaluation: lower case; periods go except in decimals; number words become digits;
articles go; a missing apostrophe of a contraction is put back; other punctuation becomes a space, or nothing where it
stands beside one. Apostrophes and colons stay ("girl's", "2:50"). What is normalised when is that of the published
script (github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, since March 2021).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

ANSWERS_PER_QUESTION = 10
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
_SOFT_SCORES = (0.0, 0.3, 0.6, 0.9)  # of an answer that 0, 1, 2, 3 of the ten people gave; 1 from four on


def _without_one_apostrophe(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word in words:
        for place in (match.start() for match in re.finditer("'", word)):
            yield word[:place] + word[place + 1 :], word


# the official table takes the apostrophe away from "somebody'd", of all words
_CONTRACTIONS = dict(_without_one_apostrophe(_CONTRACTED)) | {"somebody'd": "somebodyd"}


def normalise_answer(answer: str) -> str:
    """An answer as the official evaluation compares it: "The two dogs." → "2 dogs"."""
    text = _on_one_line(answer)
    has_number = _COMMA_BETWEEN_DIGITS.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or has_number else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def handed_in(answer: str) -> str:
    """A normalised answer as it is handed in and scored: itself, and "a" for "".

    Articles alone normalise to "", a class of the published vocabularies, but an empty answer is refused; "a" is
    normalised to it, and is what all ten people said where they agree on it.
    """
    return answer or "a"


def vqa_score(predicted: str, ten_answers: Sequence[str]) -> float:
    """The official accuracy of one prediction, 0 to 1.

    The mean over the subsets that leave one person out of min(1, agreeing people / 3). Both sides are normalised where
    the people differ; where all gave one answer, the prediction has to be this answer to the letter.

    Raises:
        ValueError: without the people's answers.
    """
    if not ten_answers:
        raise ValueError("vqa_score needs the people's answers of the question; test questions have none")
    compared = normalise_answer if len(set(map(_on_one_line, ten_answers))) > 1 else _on_one_line
    prediction = compared(predicted)
    agrees = [compared(answer) == prediction for answer in ten_answers]
    count = sum(agrees)
    return sum(min(1.0, (count - agreeing) / 3) for agreeing in agrees) / len(agrees)


def soft_score(count: int) -> float:
    """The target of an answer that `count` of the ten people gave: 0, 0.3, 0.6, 0.9, and 1 from four on."""
    return _SOFT_SCORES[count] if count < len(_SOFT_SCORES) else 1.0


def soft_targets(ten_answers: Sequence[str], label_of: Mapping[str, int]) -> dict[int, float]:
    """The classes and their targets of one question; empty where no answer is in the vocabulary.

    label_of: the class of each normalised answer.
    """
    counts = Counter(normalise_answer(answer) for answer in ten_answers)
    return {label_of[answer]: soft_score(count) for answer, count in counts.items() if answer in label_of}


def answer_vocabulary(answers: Iterator[str] | Sequence[str], at_least: int = 9) -> list[str]:
    """The normalised answers that occur `at_least` times, in the order in which they first occur.

    Given the most common answer of each question of train and val, in this order, these are the 3,129 answers of ViLT
    and METER, in their order.
    """
    counts = Counter(map(normalise_answer, answers))
    return [answer for answer, count in counts.items() if count >= at_least]
