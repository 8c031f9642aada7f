"""Downstream tasks of the toy world: questions about a scene, statements about two, hypotheses about one.

What a text says is drawn before what the pictures show, so that the text alone tells nothing: yes and no, true and
false, and the three classes of entailment are equally likely given any text. Evaluation asks about held-out
colour-shape pairs, training never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from scl_jax.data.builders import toy_scenes
from scl_jax.data.builders.targets import ENTAILMENT_CLASSES
from scl_jax.data.builders.toy_captions import relations
from scl_jax.data.builders.toy_scenes import COLOURS, HELD_OUT, SEEN, SHAPES, SIZES, Scene, Thing, pick

ANSWERS = (*COLOURS, *SHAPES, "0", "1", "2", "3", "4", "yes", "no")
_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_CARD = 11  # half the side of the card that may hide something, in pixels
_CARD_COLOUR = (150, 150, 150)
_CONTRADICTION, _NEUTRAL, _ENTAILMENT = range(len(ENTAILMENT_CLASSES))

Pair = tuple[str, str]  # colour and shape


@dataclass(frozen=True)
class Asked:
    """A text and its right answer or class."""

    text: str
    answer: str


# ---- questions about one scene ----


def draw_questions(rng: np.random.Generator, scene: Scene, evaluation: bool) -> list[Asked]:
    """One question of each kind that the scene allows: colour, shape, count, existence, relation."""
    asked = (
        _ask_colour(rng, scene),
        _ask_shape(rng, scene),
        _ask_count(rng, scene),
        _ask_existence(rng, scene, evaluation),
        _ask_relation(rng, scene),
    )
    return [one for one in asked if one is not None]


def _ask_colour(rng: np.random.Generator, scene: Scene) -> Asked | None:
    thing = _only_one(rng, scene, "shape")
    return thing and Asked(f"what colour is the {thing.shape}?", thing.colour)


def _ask_shape(rng: np.random.Generator, scene: Scene) -> Asked | None:
    thing = _only_one(rng, scene, "colour")
    return thing and Asked(f"which shape is {thing.colour}?", thing.shape)


def _ask_count(rng: np.random.Generator, scene: Scene) -> Asked:
    if rng.random() < 0.5:
        return Asked("how many shapes are there?", str(len(scene.things)))
    colour = pick(rng, scene.things).colour if rng.random() < 0.7 else pick(rng, tuple(COLOURS))
    return Asked(f"how many shapes are {colour}?", str(sum(thing.colour == colour for thing in scene.things)))


def _ask_existence(rng: np.random.Generator, scene: Scene, evaluation: bool) -> Asked:
    there = rng.random() < 0.5
    colour, shape = _shown(rng, scene.things, evaluation) if there else _not_shown(rng, scene.things, evaluation)
    return Asked(f"is there a {colour} {shape}?", "yes" if there else "no")


def _ask_relation(rng: np.random.Generator, scene: Scene) -> Asked | None:
    if len(scene.things) < 2:
        return None
    true = rng.random() < 0.5
    return Asked(f"is {' '.join(_related(rng, scene, true))}?", "yes" if true else "no")


def _only_one(rng: np.random.Generator, scene: Scene, attribute: str) -> Thing | None:
    values = [getattr(thing, attribute) for thing in scene.things]
    alone = [thing for thing, value in zip(scene.things, values, strict=True) if values.count(value) == 1]
    return pick(rng, alone) if alone else None


# ---- statements about two scenes ----


def draw_statement(
    rng: np.random.Generator, kind: int, true: bool, evaluation: bool
) -> tuple[str, tuple[Thing, ...], tuple[Thing, ...]]:
    """A statement of one of five kinds, and the objects of a left and a right image for which it is true or false."""
    if kind % 5 < 3:
        colour, shape = pick(rng, HELD_OUT if evaluation else SEEN)
        text, shows = _existence_statement(rng, kind % 5, true, f"a {colour} {shape}")
        left, right = (_scene_things(rng, evaluation, (colour, shape), present) for present in shows)
        return text, left, right
    text, (less, more), swap = _count_statement(rng, kind % 5, true)
    few, many = (_counted_things(rng, evaluation, count) for count in (less, more))
    return (text, many, few) if swap else (text, few, many)


def _existence_statement(rng: np.random.Generator, kind: int, true: bool, named: str) -> tuple[str, tuple[bool, bool]]:
    """The text, and whether the left and the right image show what it names."""
    first = bool(rng.random() < 0.5)
    if kind == 0:
        side, other = ("left" if first else "right"), bool(rng.random() < 0.5)
        return f"the {side} image shows {named}", (true, other) if first else (other, true)
    if kind == 1:
        return f"both images show {named}", (True, True) if true else (first, not first)
    return f"exactly one image shows {named}", (first, not first) if true else (first, first)


def _count_statement(rng: np.random.Generator, kind: int, true: bool) -> tuple[str, tuple[int, int], bool]:
    """The text, the smaller and larger number of shapes, and whether the left image has the larger one."""
    swap = bool(rng.random() < 0.5)
    numbers = sorted(rng.choice([2, 3, 4], size=2, replace=False).tolist())
    if kind == 4:
        counts = (numbers[0], numbers[0]) if true else (numbers[0], numbers[1])
        return "both images show equally many shapes", counts, swap
    side = ("left" if swap else "right") if true else ("right" if swap else "left")
    if rng.random() < 0.5:
        return f"the {side} image shows more shapes", (numbers[0], numbers[1]), swap
    return f"the {side} image shows fewer shapes", (numbers[0], numbers[1]), not swap


def _scene_things(rng: np.random.Generator, evaluation: bool, named: Pair, present: bool) -> tuple[Thing, ...]:
    """The objects of a scene with or without the named pair; without it, half of the time one that is nearly it."""
    things = [thing for thing in toy_scenes.draw_things(rng, evaluation) if _pair(thing) != named][:3]
    inserted = named if present else _another(rng, named, evaluation)
    things = [thing for thing in things if _pair(thing) != inserted]
    things.insert(int(rng.integers(len(things) + 1)), Thing(*inserted, pick(rng, SIZES)))
    return tuple(things)


def _counted_things(rng: np.random.Generator, evaluation: bool, count: int) -> tuple[Thing, ...]:
    while True:
        things = toy_scenes.draw_things(rng, evaluation)
        if len(things) >= count:
            return things[:count]


# ---- hypotheses about one scene ----


def draw_entailment(
    rng: np.random.Generator, evaluation: bool
) -> tuple[UInt8[np.ndarray, "H W 3"], list[tuple[str, int]]]:
    """A picture, in half of the cases with a card that may hide something, and three hypotheses with their classes.

    What is neither seen nor, without a card, hidden, is not there; behind a card it might be.
    """
    while len(things := toy_scenes.draw_things(rng, evaluation)[:3]) < 2:
        pass
    has_card = bool(rng.random() < 0.5)
    hidden = (Thing(*SEEN[0], "big"),) if has_card else ()  # holds a place for the card, and is not drawn
    placed = toy_scenes.place(rng, (*things, *hidden), frames=1)
    scene = Scene(things, placed.tracks[:, : len(things)])
    pixels = toy_scenes.render(scene, rng)[0][0]
    if has_card:
        x, y, _ = placed.tracks[0, -1].tolist()
        pixels[y - _CARD : y + _CARD + 1, x - _CARD : x + _CARD + 1] = _CARD_COLOUR
    return pixels, list(_hypotheses(rng, scene, has_card, evaluation))


def _hypotheses(rng: np.random.Generator, scene: Scene, has_card: bool, evaluation: bool) -> Iterator[tuple[str, int]]:
    # the chances make every class of every form equally likely over pictures with and without a card
    for form, if_seen, if_unseen in (("a", _ENTAILMENT, _CONTRADICTION), ("no", _CONTRADICTION, _ENTAILMENT)):
        seen = rng.random() < 1 / 3
        colour, shape = _shown(rng, scene.things, evaluation) if seen else _not_shown(rng, scene.things, evaluation)
        unseen_class = _NEUTRAL if has_card else if_unseen
        yield f"there is {form} {colour} {shape}", if_seen if seen else unseen_class
    if has_card and rng.random() < 2 / 3:
        known, unknown = pick(rng, scene.things), _not_shown(rng, scene.things, evaluation)
        ends = [f"the {known.colour} {known.shape}", "the " + " ".join(unknown)]
        if rng.random() < 0.5:
            ends.reverse()
        yield f"{ends[0]} is {_WORDS[pick(rng, tuple(_WORDS))]} {ends[1]}", _NEUTRAL
    else:
        true = bool(rng.random() < 0.5)
        one, word, other = _related(rng, scene, true)
        yield f"{one} is {word} {other}", _ENTAILMENT if true else _CONTRADICTION


# ---- what is shown ----


def _pair(thing: Thing) -> Pair:
    return thing.colour, thing.shape


def _shown(rng: np.random.Generator, things: tuple[Thing, ...], evaluation: bool) -> Pair:
    """A pair of the scene, in evaluation a held-out one."""
    pairs = [_pair(thing) for thing in things]
    return pick(rng, [pair for pair in pairs if pair in HELD_OUT] or pairs if evaluation else pairs)


def _not_shown(rng: np.random.Generator, things: tuple[Thing, ...], evaluation: bool) -> Pair:
    """A pair that is not in the scene, half of the time nearly one of it; held out or not as `_shown` would give."""
    pairs = [_pair(thing) for thing in things]
    held_out = evaluation and any(pair in HELD_OUT for pair in pairs)
    pool = [pair for pair in (HELD_OUT if held_out else SEEN) if pair not in pairs]
    near = [pair for pair in pool if any(pair[0] == colour or pair[1] == shape for colour, shape in pairs)]
    return pick(rng, near if near and rng.random() < 0.5 else pool)


def _another(rng: np.random.Generator, named: Pair, evaluation: bool) -> Pair:
    """Another pair, half of the time of the same colour or shape."""
    pool = [pair for pair in ((*SEEN, *HELD_OUT) if evaluation else SEEN) if pair != named]
    near = [pair for pair in pool if pair[0] == named[0] or pair[1] == named[1]]
    return pick(rng, near if rng.random() < 0.5 else pool)


def _related(rng: np.random.Generator, scene: Scene, true: bool) -> tuple[str, str, str]:
    """Two objects and a word of place that is true of them, or its opposite."""
    one, other = rng.permutation(len(scene.things))[:2].tolist()
    place = pick(rng, relations(scene, one, other))
    names = [f"the {scene.things[k].colour} {scene.things[k].shape}" for k in (one, other)]
    return names[0], _WORDS[place if true else _OPPOSITE[place]], names[1]
