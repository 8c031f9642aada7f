"""The language of the toy world: true captions of a scene, and where each names which object.

A caption names every object of the scene with its colour and shape, in at most 30 words. Images are described by where
and how large the objects are, clips by how they move.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from scl_jax.data.builders.toy_scenes import Scene, pick

MAX_WORDS = 30
_SYNONYM_RATE = 0.05  # how often a rarer wording takes the place of the usual one, the first of each row below
_WORDS = {
    "small": ("small", "little"),
    "big": ("big", "large"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "bigger": ("bigger than", "larger than"),
    "smaller": ("smaller than",),
    "moves": ("moves", "goes"),
    "grows": ("grows", "gets bigger"),
    "shrinks": ("shrinks", "gets smaller"),
    "still": ("stays still", "does not move"),
    "things": ("shapes", "objects"),
}
_NUMBERS = ("zero", "one", "two", "three", "four")
_CLEAR_DISTANCE = 12  # pixels by which two centres must differ for a word of place


@dataclass
class Caption:
    """A text and its noun phrases: (first character, character after the last, object)."""

    text: str = ""
    phrases: list[tuple[int, int, int]] = field(default_factory=list)


def captions(scene: Scene, rng: np.random.Generator, count: int) -> list[Caption]:
    """`count` different captions of a scene."""
    describe = _describe_clip if len(scene.tracks) > 1 else _describe_image
    found: dict[str, Caption] = {}
    while len(found) < count:
        writer = _Writer(scene, rng)
        describe(writer)
        if len(writer.caption.text.split()) <= MAX_WORDS:
            found.setdefault(writer.caption.text, writer.caption)
    return list(found.values())


def relations(scene: Scene, one: int, other: int) -> list[str]:
    """The words of place that are clearly true of two objects in the first frame: left, right, above, below.

    The centres differ by 12 pixels in that direction, and by at least half as much as in the other one.
    """
    dx, dy = (scene.tracks[0, one, :2] - scene.tracks[0, other, :2]).tolist()
    true = []
    if abs(dx) >= max(_CLEAR_DISTANCE, abs(dy) / 2):
        true.append("left" if dx < 0 else "right")
    if abs(dy) >= max(_CLEAR_DISTANCE, abs(dx) / 2):
        true.append("above" if dy < 0 else "below")
    return true


class _Writer:
    """Writes one caption piece by piece, with one choice of article and size words throughout."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene, self.rng = scene, rng
        self.caption = Caption()
        self.article = "a" if rng.random() < 0.7 else "the"
        self.name_sizes = rng.random() < 0.6
        self.named: set[int] = set()

    def write(self, *pieces: str | int) -> None:
        """Appends words, and noun phrases where a piece is the number of an object."""
        for piece in pieces:
            text = piece if isinstance(piece, str) else self._noun_phrase(piece)
            if self.caption.text and not text.startswith((",", ":")):
                self.caption.text += " "
            if isinstance(piece, int):
                start = len(self.caption.text)
                self.caption.phrases.append((start, start + len(text), piece))
            self.caption.text += text

    def word(self, meaning: str) -> str:
        """The usual wording of a meaning, or now and then another."""
        usual, *others = _WORDS[meaning]
        return pick(self.rng, others) if others and self.rng.random() < _SYNONYM_RATE else usual

    def order(self) -> list[int]:
        """The objects in an order of their own for this caption."""
        return self.rng.permutation(len(self.scene.things)).tolist()

    def _noun_phrase(self, number: int) -> str:
        thing = self.scene.things[number]
        again = number in self.named
        self.named.add(number)
        size = [self.word(thing.size)] if self.name_sizes and not again and not thing.changes_size else []
        return " ".join(["the" if again else self.article, *size, thing.colour, thing.shape])


def _describe_image(writer: _Writer) -> None:
    order, chance = writer.order(), writer.rng.random()
    if len(order) == 1:
        writer.write(*pick(writer.rng, (("only",), ("there is only",), ("just",), ("nothing but",))), order[0])
    elif chance < 0.25:
        _list(writer, order)
    else:
        _relate(writer, order)


def _list(writer: _Writer, order: list[int]) -> None:
    """two shapes: a red star and a small blue ring"""
    count = f"{_NUMBERS[len(order)]} {writer.word('things')}:"
    writer.write(*pick(writer.rng, ((), ("there is",), (count,), (f"there are {count}",))))
    for number in order[:-1]:
        writer.write(*((",",) if number != order[0] else ()), number)
    writer.write("and", order[-1])


def _relate(writer: _Writer, order: list[int]) -> None:
    """the small red star is left of the big blue circle and above the green ring"""
    first, second, *rest = order
    writer.write(first, "is", _relation(writer, first, second), second)
    if len(rest) == 2 and writer.rng.random() < 0.5:
        third, fourth = rest
        writer.write(", and", third, "is", _relation(writer, third, fourth), fourth)
        return
    if rest and writer.rng.random() < 0.6:
        third = rest.pop(0)
        writer.write("and", _relation(writer, first, third), third)
    for number in rest:
        known = pick(writer.rng, sorted(writer.named))
        writer.write(", and", number, "is", _relation(writer, number, known), known)


def _relation(writer: _Writer, one: int, other: int) -> str:
    """A word, or two, for how one object stands to another."""
    sizes = writer.scene.things[one].size, writer.scene.things[other].size
    if sizes[0] != sizes[1] and writer.rng.random() < 0.15:
        return writer.word("bigger" if sizes[0] == "big" else "smaller")
    places = relations(writer.scene, one, other)
    if len(places) == 2 and writer.rng.random() < 0.2:
        return f"{places[1]} and {writer.word(places[0])}"  # above and left of
    return writer.word(pick(writer.rng, places))


def _describe_clip(writer: _Writer) -> None:
    """the red star moves left, then up while the blue ring stays still"""
    order = writer.order()
    joints = {1: (), 2: (pick(writer.rng, ("while", "and", "as")),), 3: (",", "and")}[len(order)]
    for place, number in enumerate(order):
        writer.write(*joints[place - 1 : place] if place else (), number, *_motion(writer, number))


def _motion(writer: _Writer, number: int) -> tuple[str, ...]:
    motion = writer.scene.things[number].motion
    if not motion:
        return (writer.word("still"),)
    if motion[0] in ("grows", "shrinks"):
        return (writer.word(motion[0]),)
    if len(motion) == 1:
        return (writer.word("moves"), motion[0])
    first, second = motion
    return pick(
        writer.rng,
        (
            (writer.word("moves"), first, ", then", second),
            (writer.word("moves"), first, "and then", second),
            ("first", writer.word("moves"), first, ", then", second),
        ),
    )
