"""Pictures of attention: where a text, and each of its words, looks in an image or clip.

A row of pictures for an image, a strip of frames a word for a clip. Each map is stretched bilinearly over the picture
and coloured on a scale of its own, from no attention to its strongest patch, in perceptually uniform colours.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image

from scl_jax.inference.texts import AttentionMap
from scl_jax.plots import FAINT, GREY, INK, STYLE

COLORS = "magma"  # perceptually uniform, and readable in grey
ALL = "whole text"
_FUNCTION_WORDS = frozenset(["a", "an", "the", "of", "to", "is", "are", "and", "or", "in", "on", "at", "by", "with"])
_FORMATS = (".png", ".pdf", ".svg")
_PIXELS = 224  # a side of an overlay
_LARGEST_GRID = 24  # maps of one sheet
_CELL = 1.55  # inches of a map of an image
_LABEL = 2.4  # inches of a word beside a strip, at most


def overlay(
    picture: UInt8[np.ndarray, "H W 3"],
    attention: Float[np.ndarray, "R C"],
    strongest: float | None = None,
    pixels: int = _PIXELS,
) -> UInt8[np.ndarray, "pixels pixels 3"]:
    """A picture under its attention, square: colour where attention is, a darkened picture elsewhere.

    Args:
        strongest: the attention that gets the brightest colour; None: the map's maximum.
    """
    top = float(attention.max()) if strongest is None else strongest
    level = np.clip(attention / top, 0, 1) if top > 0 else np.zeros_like(attention)
    smooth = Image.fromarray(level.astype(np.float32)).resize((pixels, pixels), Image.Resampling.BILINEAR)
    level = np.asarray(smooth)[..., None]
    base = np.asarray(Image.fromarray(picture).resize((pixels, pixels), Image.Resampling.BICUBIC), np.float32) / 255
    color = colormaps[COLORS](level[..., 0])[..., :3]
    opacity = 0.85 * level**0.75
    mixed = 0.55 * base * (1 - opacity) + color * opacity
    return (np.clip(mixed, 0, 1) * 255).astype(np.uint8)


def attention_sheet(
    attention: AttentionMap, path: Path | str, *, words: Sequence[str] | None = None, columns: int = 6
) -> Path:
    """Draws the picture, the map of the whole text and one for each word that names something.

    Args:
        path: ends in .png, .pdf or .svg.
        words: the words to draw, in order of the text; None: all but articles, conjunctions and punctuation.
        columns: pictures a row (of an image); a clip has a row a word and a column a frame.

    Raises:
        ValueError: another ending, or none of the words is in the text.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path}: pictures are written as {', '.join(_FORMATS)}")
    maps = [(ALL, attention.overall), *word_maps(attention, words)]
    with rc_context(STYLE):
        figure = _image_sheet(attention, maps, columns) if len(attention.frames) == 1 else _strips(attention, maps)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")
    return path


def word_maps(
    attention: AttentionMap, words: Sequence[str] | None = None
) -> list[tuple[str, Float[np.ndarray, "F R C"]]]:
    """The words that a sheet shows (as `attention_sheet` chooses them) and their maps, in order of the text.

    Raises:
        ValueError: none of `words` is in the text.
    """
    wanted = None if words is None else {word.lower() for word in words}
    found = []
    for word, values in zip(attention.words, attention.per_word, strict=True):
        plain = word.lower()
        says_something = any(letter.isalnum() for letter in word) and plain not in _FUNCTION_WORDS
        if (plain in wanted) if wanted is not None else says_something:
            found.append((word, values))
    if wanted is not None and not found:
        raise ValueError(f"none of {', '.join(sorted(wanted))} is a word of {attention.text!r}")
    return found[: _LARGEST_GRID - 1]


def _image_sheet(attention: AttentionMap, maps: list[tuple[str, np.ndarray]], columns: int) -> Figure:
    """The picture as it is, then the maps, row by row."""
    cells = len(maps) + 1
    columns = min(columns, cells)
    rows = math.ceil(cells / columns)
    figure, axes = _grid(attention.text, rows, columns, _CELL)
    picture = attention.frames[0]
    _show(axes[0], np.asarray(Image.fromarray(picture).resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC)))
    axes[0].set_title("image", color=GREY, fontweight="normal", loc="center")
    for place, (word, values) in zip(axes[1:], maps, strict=False):
        _show(place, overlay(picture, values[0]))
        _caption(place, word)
    for empty in axes[cells:]:
        empty.set_visible(False)
    return figure


def _strips(attention: AttentionMap, maps: list[tuple[str, np.ndarray]]) -> Figure:
    """A row a word and a column a frame; the frames of a row share its scale."""
    frames = attention.frames
    labels = [_fitting(word, _LABEL) for word, _ in maps]
    left = max(1.05, 0.25 + max(map(_width, labels)))
    figure, axes = _grid(attention.text, len(maps) + 1, len(frames), 1.2, left, between=0.08)
    grid = axes.reshape(len(maps) + 1, len(frames))
    for number, picture in enumerate(frames):
        _show(grid[0, number], np.asarray(Image.fromarray(picture).resize((_PIXELS, _PIXELS))))
        grid[0, number].set_title(f"frame {number + 1}", color=GREY, fontweight="normal", loc="center")
    for row, label, (word, values) in zip(grid[1:], labels, maps, strict=True):
        for place, picture, one in zip(row, frames, values, strict=True):
            _show(place, overlay(picture, one, float(values.max())))
        weight = "normal" if word == ALL else "bold"
        row[0].text(
            -0.08, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=9, fontweight=weight
        )
    return figure


def _grid(
    text: str, rows: int, columns: int, cell: float, left: float = 0.12, between: float = 0.28
) -> tuple[Figure, np.ndarray]:
    """Axes of `rows` × `columns` squares of `cell` inches, rows `between` inches apart; a heading, and a colour bar."""
    heading, foot = 0.48, 0.42
    width = max(left + columns * (cell + 0.08) + 0.12, left + 1.6 + 2.4)  # the latter: the bar and its note
    lines = textwrap.wrap(text, max(30, int(width * 11)))[:3]
    heading += 0.19 * len(lines)
    height = heading + rows * (cell + between) + foot
    figure = Figure(figsize=(width, height))
    figure.text(0.12 / width, 1 - 0.12 / height, "\n".join(lines), va="top", fontsize=10, fontweight="bold", color=INK)
    places = [
        figure.add_axes(
            (
                (left + column * (cell + 0.08)) / width,
                1 - (heading + row * (cell + between) + cell) / height,
                cell / width,
                cell / height,
            )
        )
        for row in range(rows)
        for column in range(columns)
    ]
    bar = figure.add_axes((left / width, 0.24 / height, 1.5 / width, 0.07 / height))
    bar.imshow(np.linspace(0, 1, 256)[None], cmap=COLORS, aspect="auto", norm=Normalize(0, 1))
    bar.set_xticks([])
    bar.set_yticks([])
    for spine in bar.spines.values():
        spine.set_visible(False)
    note = "attention: none → the map's strongest patch"
    figure.text((left + 1.6) / width, 0.275 / height, note, fontsize=7, color=GREY, va="center")
    return figure, np.asarray(places, object)


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(FAINT)


def _caption(axes: Axes, word: str) -> None:
    weight = "normal" if word == ALL else "bold"
    axes.set_title(_fitting(word, _CELL), loc="center", fontweight=weight, color=INK)


def _width(word: str) -> float:
    """Inches of a bold word in the size of titles and labels."""
    return float(TextPath((0, 0), word, size=9, prop=FontProperties(weight="bold")).get_extents().width) / 72


def _fitting(word: str, inches: float) -> str:
    """The word, cut short where it is wider than this."""
    shown = word
    while _width(shown) > inches and word:
        word = word[:-1]
        shown = f"{word}…"
    return shown
