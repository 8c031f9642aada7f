"""The published rules of VQA's evaluation as a table, its accuracy by hand, and the soft targets."""

import itertools

import pytest

from scl_jax.data.vqa_answers import (
    answer_vocabulary,
    handed_in,
    normalise_answer,
    soft_score,
    soft_targets,
    vqa_score,
)

NORMALISED = [
    # lower case and spaces
    ("Yes", "yes"),
    ("  NO ", "no"),
    ("New\nYork", "new york"),
    ("red\tand  white", "red and white"),
    ("", ""),
    # articles
    ("a dog", "dog"),
    ("an apple", "apple"),
    ("The Man in the Hat", "man in hat"),
    ("a", ""),
    ("theatre", "theatre"),
    ("on a table", "on table"),
    # number words
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("Two", "2"),
    ("three dogs", "3 dogs"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
    ("eleven", "eleven"),
    ("one hundred", "1 hundred"),
    ("someone", "someone"),
    # periods
    ("yes.", "yes"),
    ("3.5", "3.5"),
    (".5", ".5"),
    ("u.s.a.", "usa"),
    ("mr. smith", "mr smith"),
    ("4.", "4"),
    ("10 a.m.", "10 am"),
    # commas
    ("100,978", "100978"),
    ("red,white", "red white"),
    ("red, white", "red white"),
    ("red ,white", "red white"),
    ("1,2 and three", "12 and 3"),
    # other punctuation: a space, or nothing beside one
    ("x-y;-z", "x y z"),  # in the answer as it was given
    ("t-shirt", "t shirt"),
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("what?", "what"),
    ("what? yes", "what yes"),
    ("stop!", "stop"),
    ("(left)", "left"),
    ("[left]", "left"),
    ("{left}", "left"),
    ('"stop"', "stop"),
    ("a;b", "b"),
    ("x=y", "x y"),
    ("2+2", "2 2"),
    ("me@home", "me home"),
    ("snow_board", "snow board"),
    ("back\\slash", "back slash"),
    ("<3", "3"),
    ("`tick`", "tick"),
    ("black-and white -grey", "blackand white grey"),  # one hyphen beside a space: all go without one
    ("1,000-meter", "1000meter"),  # a number with a comma: no mark leaves a space
    # colons and apostrophes stay
    ("2:50 PM", "2:50 pm"),
    ("girl's", "girl's"),
    ("girls'", "girls'"),
    # contractions
    ("dont", "don't"),
    ("Don't", "don't"),
    ("isnt it", "isn't it"),
    ("wont know", "won't know"),
    ("shes", "shes"),
    ("im", "im"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),
    ("hes the one", "he's 1"),
    ("oclock", "o'clock"),
    ("3 oclock", "3 o'clock"),
    ("twas", "'twas"),
    ("yalld've", "yalld've"),
    ("y'alld've", "y'all'd've"),
    ("y'allll", "y'all'll"),
    ("'ows'at", "'ow's'at"),
    ("somebody'd", "somebodyd"),
    ("were", "were"),
    ("well", "well"),
    ("whats", "what's"),
    ("theyre", "they're"),
    ("über", "über"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), NORMALISED)
def test_normalisation_follows_the_published_rules(answer, expected):
    assert normalise_answer(answer) == expected


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (9, 1.0)])
def test_accuracy_is_the_mean_over_subsets_of_nine(agreeing, score):
    people = ["Two dogs."] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert vqa_score("2 dogs", people) == pytest.approx(score)
    subsets = [[person for j, person in enumerate(people) if j != i] for i in range(10)]
    assert score == pytest.approx(sum(min(1, subset.count("Two dogs.") / 3) for subset in subsets) / 10)


def test_both_sides_of_the_accuracy_are_normalised():
    assert vqa_score("The DOG!", ["a dog"] * 5 + ["cat"] * 5) == 1
    assert vqa_score("none", ["0"] * 2 + ["none"] + ["1"] * 7) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="test questions have none"):
        vqa_score("dog", [])


def test_an_answer_that_all_people_gave_is_compared_as_it_stands():
    """As vqaEval.py does, which normalises `if len(set(gtAnswers)) > 1`."""
    assert vqa_score("0", ["none"] * 10) == 0 and vqa_score("0", ["none"] * 9 + ["zero"]) == 1
    assert vqa_score("none", ["none", " none\n"] * 5) == 1  # what encloses them is taken off first
    assert vqa_score(" Dog.", ["Dog."] * 10) == 1 and vqa_score("dog", ["Dog."] * 10) == 0


def test_the_empty_class_is_handed_in_as_an_article():
    assert [handed_in(answer) for answer in ("", "dog")] == ["a", "dog"]
    for people in (["a"] * 10, ["a"] * 6 + ["the"] * 4):
        assert normalise_answer(handed_in(normalise_answer(people[0]))) == ""
        assert vqa_score(handed_in(""), people) == 1


def test_soft_targets_are_those_of_training():
    assert [soft_score(count) for count in (0, 1, 2, 3, 4, 10)] == [0, 0.3, 0.6, 0.9, 1, 1]
    label_of = {"2": 0, "dog": 1}
    assert soft_targets(["two", "2", "Two."] + ["a dog"] * 6 + ["horse"], label_of) == {0: 0.9, 1: 1.0}
    assert soft_targets(["horse"] * 10, label_of) == {}


def test_the_vocabulary_holds_what_occurs_often_enough_in_order_of_first_occurrence():
    answers = itertools.chain(["Dog"] * 5, ["two"] * 9, ["dog."] * 4, ["cat"] * 8)
    assert answer_vocabulary(answers) == ["dog", "2"]
    assert answer_vocabulary(["b", "c", "b"], at_least=1) == ["b", "c"]
