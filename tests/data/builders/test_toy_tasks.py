"""What is true of every question, statement and hypothesis of the toy world."""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from scl_jax.data.builders import open_source, prepare, toy_scenes, toy_world
from scl_jax.data.builders.targets import ENTAILMENT_CLASSES
from scl_jax.data.builders.toy_tasks import ANSWERS, draw_entailment, draw_questions, draw_statement

TASKS = ("questions", "statements", "entailment")
PLACES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis and sign
HELD_OUT = {" ".join(pair) for pair in toy_scenes.HELD_OUT}


def scenes(evaluation: bool, count: int):
    for index in range(count):
        rng = np.random.default_rng([7, index])
        yield rng, toy_scenes.place(rng, toy_scenes.draw_things(rng, evaluation), frames=1)


def names_of(things) -> list[str]:
    return [f"{thing.colour} {thing.shape}" for thing in things]


def is_true(scene, one: str, place: str, other: str) -> bool:
    axis, sign = PLACES[place]
    centres = dict(zip(names_of(scene.things), scene.tracks[0, :, axis].tolist(), strict=True))
    return (centres[one] - centres[other]) * sign > 0


def right_answer(scene, question: str) -> str:
    things = scene.things
    if match := re.fullmatch(r"what colour is the (\w+)\?", question):
        (answer,) = [thing.colour for thing in things if thing.shape == match[1]]
    elif match := re.fullmatch(r"which shape is (\w+)\?", question):
        (answer,) = [thing.shape for thing in things if thing.colour == match[1]]
    elif question == "how many shapes are there?":
        answer = str(len(things))
    elif match := re.fullmatch(r"how many shapes are (\w+)\?", question):
        answer = str(sum(thing.colour == match[1] for thing in things))
    elif match := re.fullmatch(r"is there a (\w+ \w+)\?", question):
        answer = "yes" if match[1] in names_of(things) else "no"
    else:
        match = re.fullmatch(r"is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", question)
        assert match, question
        answer = "yes" if is_true(scene, *match.groups()) else "no"
    return answer


@pytest.mark.parametrize("evaluation", [False, True])
def test_answers_are_right_and_yes_is_as_frequent_as_no(evaluation):
    answers = defaultdict(Counter)
    for rng, scene in scenes(evaluation, 400):
        for asked in draw_questions(rng, scene, evaluation):
            assert asked.answer == right_answer(scene, asked.text) and asked.answer in ANSWERS
            answers[asked.text.split()[1]][asked.answer] += 1
    assert len(answers) == 5 and sum(map(len, (answers["colour"], answers["shape"], answers["many"]))) >= 20
    for kind in ("there", "the"):
        assert abs(answers[kind]["yes"] / answers[kind].total() - 0.5) < 0.08


@pytest.mark.parametrize("evaluation", [False, True])
def test_statements_are_true_or_false_as_said_and_the_text_tells_nothing(evaluation):
    rng = np.random.default_rng(3)
    seen = defaultdict(Counter)
    for index in range(2000):
        true = index % 2 == 1
        text, left, right = draw_statement(rng, index // 2, true, evaluation)
        assert statement_holds(text, names_of(left), names_of(right)) == true, (text, left, right)
        assert 1 <= len(left) <= 4 and 1 <= len(right) <= 4
        pair = re.search(r"a (\w+ \w+)$", text)
        seen[text.replace(pair[1], "thing") if pair else text][true] += 1
        assert pair is None or (pair[1] in HELD_OUT) == evaluation
    assert len(seen) == 9
    assert all(abs(counts[True] / counts.total() - 0.5) < 0.13 for counts in seen.values())


def statement_holds(text: str, left: list[str], right: list[str]) -> bool:
    if text == "both images show equally many shapes":
        return len(left) == len(right)
    if match := re.fullmatch(r"the (left|right) image shows (more|fewer) shapes", text):
        first, second = (left, right) if match[1] == "left" else (right, left)
        return len(first) > len(second) if match[2] == "more" else len(first) < len(second)
    named = text.split(" a ")[1]
    shown = (named in left, named in right)
    if text.startswith("both images show a"):
        return all(shown)
    if text.startswith("exactly one image shows a"):
        return sum(shown) == 1
    return shown[0] if text.startswith("the left image shows a") else shown[1]


def test_hypotheses_follow_from_what_is_seen_and_what_a_card_may_hide(monkeypatch):
    shown = []
    render = toy_scenes.render
    monkeypatch.setattr(toy_scenes, "render", lambda scene, rng: (shown.append(scene), render(scene, rng))[1])
    by_form = defaultdict(Counter)
    for index in range(600):
        pixels, hypotheses = draw_entailment(np.random.default_rng([5, index]), evaluation=index % 2 == 1)
        card = (pixels == 150).all(axis=2).sum() == 23 * 23
        for text, label in hypotheses:
            assert ENTAILMENT_CLASSES[label] == right_class(shown[-1], card, text), text
            by_form[text.split()[2] if text.startswith("there") else "relation"][label] += 1
    assert set(by_form) == {"a", "no", "relation"}
    for counts in by_form.values():
        assert all(abs(counts[label] / counts.total() - 1 / 3) < 0.08 for label in range(3))


def right_class(scene, card: bool, text: str) -> str:
    names = names_of(scene.things)
    if match := re.fullmatch(r"there is (a|no) (\w+ \w+)", text):
        if match[2] not in names and card:
            return "neutral"
        return "entailment" if (match[2] in names) == (match[1] == "a") else "contradiction"
    match = re.fullmatch(r"the (\w+ \w+) is (left of|right of|above|below) the (\w+ \w+)", text)
    assert match, text
    if match[1] not in names or match[3] not in names:
        assert card and (match[1] in names or match[3] in names)
        return "neutral"
    return "entailment" if is_true(scene, *match.groups()) else "contradiction"


@pytest.mark.parametrize("task", TASKS)
def test_records_depend_on_seed_split_and_index_only_and_survive_the_shards(tmp_path, task):
    prepare(f"toy_world/{task}", tmp_path, train=3, validation=4, test=2)
    for split, size in (("train", 3), ("validation", 4), ("test", 2)):
        source = open_source(f"toy_world/{task}", split, tmp_path)
        expected = list(toy_world.records(task, split, 9, seed=0))[:size]
        assert source.text_counts() == [len(record["captions"]) for record in expected]
        for index, record in enumerate(expected):
            for key, value in record.items():
                np.testing.assert_array_equal(source[index][key], value)
    assert next(toy_world.records(task, "train", 1, seed=1))["media"] != source[0]["media"]
    assert source.classes == {"questions": ANSWERS, "statements": ("false", "true")}.get(task, ENTAILMENT_CLASSES)
    assert np.asarray(Image.open(io.BytesIO(source[0]["media"]))).shape == (96, 96, 3)


@pytest.mark.parametrize("task", TASKS)
def test_training_texts_never_name_a_held_out_pair_and_evaluation_texts_often_do(task):
    named = {
        split: [
            any(pair in text for pair in HELD_OUT)
            for record in toy_world.records(task, split, 100, seed=0)
            for text in record["captions"]
        ]
        for split in ("train", "validation")
    }
    assert not any(named["train"])
    assert np.mean(named["validation"]) > 0.25
