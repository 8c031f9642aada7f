"""Scenes of the toy world: coloured shapes, their tracks over the frames of a clip, and their pixels.

Axes: F frames (1 for an image), K objects, H W pixels (96 each). A scene is drawn from a numpy generator and rendered
from cached, anti-aliased shapes. Objects never overlap, touch the border or repeat a colour-shape pair within a scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

PIXELS = 96  # height and width of a frame
# Objects of stills lie in the middles of cells of so many pixels, a patch of the quickstart's network: from random
# weights it learns in minutes to tell shapes apart there, and not at all where a patch may cut them anywhere.
CELL = 16
COLOURS = {
    "red": (222, 30, 30),
    "green": (25, 150, 50),
    "blue": (30, 70, 225),
    "yellow": (250, 205, 0),
    "purple": (125, 35, 165),
    "pink": (255, 120, 190),
    "cyan": (0, 195, 215),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring")
SIZES = ("small", "big")
RADII = {"small": (8, 9), "big": (14, 16)}  # pixels, smallest and largest of a size
# colour-shape pairs that no training scene contains: every colour and every shape once
HELD_OUT: tuple[tuple[str, str], ...] = tuple(
    zip(COLOURS, ("star", "ring", "heart", "circle", "diamond", "square", "cross", "triangle"), strict=True)
)
SEEN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)

_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # of x, y: y grows downwards
_GAP = 3  # pixels between objects, and between an object and the border
_SUPERSAMPLING = 8
_MOVING = ((True,), (True, True), (True, False), (True, True, False))  # which objects of a clip move
_SLOPE = np.linspace(-1, 1, PIXELS)[:, None, None]

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `motion` holds its phases in order: left, right, up, down, or grows, shrinks alone."""

    colour: str
    shape: str
    size: str
    motion: tuple[str, ...] = ()

    @property
    def changes_size(self) -> bool:
        """Whether neither size word is true of the whole clip."""
        return self.motion in (("grows",), ("shrinks",))


@dataclass(frozen=True)
class Scene:
    """Objects and where they are in each frame, in pixels: centre x, centre y and radius."""

    things: tuple[Thing, ...]
    tracks: Int[np.ndarray, "F K 3"]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each as likely (`rng.choice` takes ten times as long)."""
    return options[int(rng.integers(len(options)))]


def draw_things(rng: np.random.Generator, held_out: bool) -> tuple[Thing, ...]:
    """One to four objects of an image; with `held_out` two to four, at least one of them a held-out pair.

    A single object would be part of too many other scenes to be told from them by its caption.
    """
    count = pick(rng, (2, 2, 2, 3, 3, 3, 4) if held_out else (1, 2, 2, 2, 3, 3, 3, 3, 4, 4))
    return tuple(Thing(colour, shape, pick(rng, SIZES)) for colour, shape in _pairs(rng, count, held_out))


def draw_moving_things(rng: np.random.Generator, held_out: bool) -> tuple[Thing, ...]:
    """One or two objects that move, grow or shrink in a clip, and perhaps one that stays still.

    With `held_out` there are at least two objects, and at least one is a held-out pair.
    """
    moving = pick(rng, ((True, True), (True, False), (True, True, False)) if held_out else _MOVING)
    things = []
    for (colour, shape), moves in zip(_pairs(rng, len(moving), held_out), moving, strict=True):
        motion = _motion(rng) if moves else ()
        size = pick(rng, SIZES)  # of no meaning where it changes
        things.append(Thing(colour, shape, size, motion))
    return tuple(things)


def place(rng: np.random.Generator, things: tuple[Thing, ...], frames: int) -> Scene:
    """Moves the objects inside the frame and apart from one another, by drawing places until they are free."""
    while True:
        tracks: list[np.ndarray] = []
        for thing in things:
            track = _free_track(rng, thing, frames, tracks)
            if track is None:
                break
            tracks.append(track)
        else:
            return Scene(things, np.stack(tracks, axis=1))


def render(scene: Scene, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "F H W 3"], UInt8[np.ndarray, "F H W"]]:
    """The frames in sRGB and their label maps: 0 background, k + 1 where object k is.

    The background is plain and light, with a tint and a soft gradient; the brightness of an object varies a little.
    """
    frames = len(scene.tracks)
    background = rng.uniform(228, 242) + rng.uniform(-6, 6, size=3) + _SLOPE * rng.uniform(-6, 6)  # (H, 1, 3)
    pixels = np.empty((frames, PIXELS, PIXELS, 3), np.uint8)
    pixels[:] = background.astype(np.uint8)
    labels = np.zeros((frames, PIXELS, PIXELS), np.uint8)
    for k, thing in enumerate(scene.things):
        colour = np.clip(np.asarray(COLOURS[thing.colour]) * rng.uniform(0.94, 1.04), 0, 255).astype(np.float32)
        painted: dict[int, np.ndarray] = {}  # by radius
        for frame, (x, y, radius) in enumerate(scene.tracks[:, k].tolist()):
            stamp = _stamp(thing.shape, radius)
            if radius not in painted:
                painted[radius] = stamp.coverage * colour
            window = (frame, slice(y - radius, y + radius + 1), slice(x - radius, x + radius + 1))
            pixels[window] = pixels[window] * (1 - stamp.coverage) + painted[radius]
            labels[window][stamp.inside] = k + 1
    return pixels, labels


def boxes(scene: Scene) -> Int[np.ndarray, "F K 4"]:
    """The tight box of every object in every frame: x0, y0, x1, y1 in pixels, x1 and y1 just outside."""
    found = np.empty((*scene.tracks.shape[:2], 4), np.int32)
    for frame, tracks in enumerate(scene.tracks.tolist()):
        for k, (x, y, radius) in enumerate(tracks):
            x0, y0, x1, y1 = _stamp(scene.things[k].shape, radius).box
            left, top = x - radius, y - radius
            found[frame, k] = (left + x0, top + y0, left + x1, top + y1)
    return found


def _pairs(rng: np.random.Generator, count: int, held_out: bool) -> list[tuple[str, str]]:
    """Distinct colour-shape pairs: seen ones only, or a held-out one among any."""
    pairs = [pick(rng, HELD_OUT)] if held_out else []
    pool = (*SEEN, *HELD_OUT) if held_out else SEEN
    while len(pairs) < count:
        pair = pick(rng, pool)
        if pair not in pairs:
            pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def _motion(rng: np.random.Generator) -> tuple[str, ...]:
    """Two phases of different directions half of the time, else one; now and then a change of size."""
    chance = rng.random()
    if chance < 0.15:
        return (pick(rng, ("grows", "shrinks")),)
    first = pick(rng, tuple(_STEPS))
    if chance < 0.5:
        return (first,)
    return (first, pick(rng, [step for step in _STEPS if step != first]))


def _free_track(rng: np.random.Generator, thing: Thing, frames: int, others: list[np.ndarray]) -> np.ndarray | None:
    """A track (F, 3) that meets no other, or None when 20 places were taken."""
    path = _path(rng, thing, frames)
    margin = path[:, 2:] + _GAP
    low, high = (margin - path[:, :2]).max(axis=0), (PIXELS - 1 - margin - path[:, :2]).min(axis=0)
    if (low > high).any():
        return None
    if frames == 1:  # in a still, the middles of cells
        first, last = -(-(low - CELL // 2) // CELL), (high - CELL // 2) // CELL
        starts = rng.integers(first, last + 1, size=(20, 2)) * CELL + CELL // 2
    else:
        starts = rng.integers(low, high + 1, size=(20, 2))
    places = path[:, :2] + starts[:, None]  # (20, F, 2)
    free = np.ones(20, bool)
    for other in others:
        x, y = places[:, :, 0] - other[:, 0], places[:, :, 1] - other[:, 1]
        free &= (x * x + y * y >= (path[:, 2] + other[:, 2] + _GAP) ** 2).all(axis=1)
    if not free.any():
        return None
    return np.concatenate([places[free.argmax()], path[:, 2:]], axis=1)


def _path(rng: np.random.Generator, thing: Thing, frames: int) -> Int[np.ndarray, "F 3"]:
    """Offsets from the start, and radii, of an object over the frames; every phase takes about the same time."""
    path = np.zeros((frames, 3), np.int64)
    path[:, 2] = rng.integers(RADII[thing.size][0], RADII[thing.size][1] + 1)
    if thing.changes_size:
        small, big = RADII["small"][0], RADII["big"][1]
        path[:, 2] = np.rint(np.linspace(small, big, frames))
        if thing.motion == ("shrinks",):
            path[:, 2] = path[::-1, 2].copy()
        return path
    if not thing.motion:
        return path
    turns = np.rint(np.linspace(0, frames - 1, len(thing.motion) + 1)).astype(int)
    for phase, step in enumerate(thing.motion):
        distance = rng.integers(24, 41)
        progress = np.clip((np.arange(frames) - turns[phase]) / (turns[phase + 1] - turns[phase]), 0, 1)
        path[:, :2] += np.rint(progress * distance).astype(np.int64)[:, None] * np.asarray(_STEPS[step])
    return path


@dataclass(frozen=True)
class _Stamp:
    """A shape on D = 2·radius + 1 pixels."""

    coverage: Float[np.ndarray, "D D 3"]  # from 0 to 1, the same in the three channels
    inside: Bool[np.ndarray, "D D"]  # covered by half or more
    box: tuple[int, int, int, int]  # of `inside`: x0, y0, x1, y1


@cache
def _stamp(shape: str, radius: int) -> _Stamp:
    """Draws a shape, eight times as large at first so that its edges come out smooth."""
    side = (2 * radius + 1) * _SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    scale = side / 2 - 1
    if shape in ("circle", "ring"):
        draw.ellipse((1, 1, side - 2, side - 2), fill=255)
        if shape == "ring":
            inner = side / 2 * 0.45  # the hole stays visible in a small ring
            draw.ellipse((inner, inner, side - 1 - inner, side - 1 - inner), fill=0)
    else:
        draw.polygon([(side / 2 + x * scale, side / 2 + y * scale) for x, y in _outline(shape)], fill=255)
    coverage = np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32) / 255
    inside = coverage >= 0.5
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return _Stamp(np.repeat(coverage[:, :, None], 3, axis=2), inside, box)


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in the square from -1 to 1, y downwards."""
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "triangle":
        return [(0, -0.95), (1, 0.85), (-1, 0.85)]
    if shape == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if shape == "cross":
        arm = 0.33
        quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
        turned = [(x, y) for x, y in quarter]
        for _ in range(3):
            quarter = [(-y, x) for x, y in quarter]
            turned += quarter
        return turned
    if shape == "star":
        angles = [math.pi * i / 5 for i in range(10)]
        return [
            ((0.42 if i % 2 else 1) * math.sin(a), -(0.42 if i % 2 else 1) * math.cos(a)) for i, a in enumerate(angles)
        ]
    angles = [2 * math.pi * i / 60 for i in range(60)]  # heart
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 - 0.1)
        for a in angles
    ]
