"""Pictures of a run: loss curves, and what retrieval finds.

Drawn with matplotlib's object interface, which keeps no global state and needs no display.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from scl_jax.evaluation.ranking import Ranking, Top
from scl_jax.training.records import read_lines

INK, GREY, FAINT, GREEN = "#1f2430", "#7a8190", "#d9dce3", "#1a9850"
PALETTE = ("#3366cc", "#e0802b", "#2a9d8f", "#b8487c", "#7b5fc0", "#8c6d31")
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # captions are anyone's: "$5 off" is no formula
    "axes.edgecolor": FAINT,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#eef0f4",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "savefig.dpi": 150,
}

Line = tuple[np.ndarray, np.ndarray]  # steps, values
Media = Callable[[int], UInt8[np.ndarray, "F H W 3"]]


def loss_curves(metrics_jsonl: Path | str, png: Path | str) -> Path:
    """Draws the curves of a run: a panel an objective, then accuracies, retrieval, learning rate and temperature.

    Reads the names that `training.logging` documents. A pale line is the raw loss, the dark one its running mean.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no losses.
    """
    lines = _read_lines(Path(metrics_jsonl))
    panels = _panels(lines)
    if not any(name.startswith("loss/") for name in lines):
        raise ValueError(f"{metrics_jsonl} holds no loss: it is written as training goes; has the run taken a step?")
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.1 * columns, 2.05 * rows))
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        all_axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True)).ravel()
        for axes, (title, members) in zip(all_axes, panels.items(), strict=False):
            _draw_panel(axes, title, {label: lines[name] for label, name in members.items()})
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        for axes in all_axes[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        return _save(figure, png)


def _read_lines(path: Path) -> dict[str, Line]:
    """Every metric as steps and values; null (not finite) becomes a gap."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in read_lines(path):
        step = record.pop("step")
        for name, value in record.items():
            points.setdefault(name, []).append((step, math.nan if value is None else float(value)))
    return {name: (np.array(line)[:, 0], np.array(line)[:, 1]) for name, line in points.items()}


def _panels(lines: dict[str, Line]) -> dict[str, dict[str, str]]:
    """Title → label → metric name, in the order in which they are drawn."""
    panels: dict[str, dict[str, str]] = {}
    names = sorted(lines, key=lambda name: name != "loss/total")  # the total first, the others as they were logged
    for name in (name for name in names if name.startswith("loss/")):
        _, *stream, objective = name.split("/")
        title = "total loss" if objective == "total" else objective.replace("_", " ")
        panels.setdefault(title, {})[" ".join(stream)] = name
    for name in lines:
        parts = [part.replace("_", " ") for part in name.split("/")]
        if name.startswith("accuracy/"):
            panels.setdefault("accuracy", {})[f"{' '.join(parts[1:])}, training"] = name
        elif name.endswith(("/accuracy", "/score")):
            panels.setdefault("accuracy", {})[f"{' '.join(parts[:-1])}, held out"] = name
        elif name.startswith("retrieval/") and name.endswith("/recall@1") and "/contrastive/" not in name:
            panels.setdefault("recall@1, held out", {})[parts[-2].replace(" to ", " → ")] = name
    for name in ("learning_rate", "temperature"):
        if name in lines:
            panels[name.replace("_", " ")] = {"": name}
    return panels


def _draw_panel(axes: Axes, title: str, members: dict[str, Line]) -> None:
    is_share = title.startswith(("accuracy", "recall"))
    for color, (label, (steps, values)) in zip(PALETTE * 9, members.items(), strict=False):
        marker = "o" if len(steps) < 30 else None
        if len(steps) < 60 or title in ("learning rate", "temperature"):
            axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=2.5, label=label)
        else:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            axes.plot(steps, _running_mean(values), color=color, linewidth=1.5, label=label)
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if is_share:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        _scale_values(axes, np.concatenate([values for _, values in members.values()]), title == "learning rate")
    if any(members):
        axes.legend(loc="best", handlelength=1.2, borderpad=0.2, labelspacing=0.3)


def _scale_values(axes: Axes, values: np.ndarray, linear: bool) -> None:
    """A log scale where a loss falls by more than a factor of ten; rates from zero stay linear."""
    finite = values[np.isfinite(values)]
    if linear or finite.size == 0 or finite.min() <= 0 or finite.max() / finite.min() < 10:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the points around each, a thirtieth of the curve to either side; gaps are left out of it."""
    reach = max(1, len(values) // 30)
    window = np.ones(2 * reach + 1)
    known = np.isfinite(values)
    count = np.convolve(known, window, "same")
    return np.where(count > 0, np.convolve(np.where(known, values, 0.0), window, "same") / np.maximum(count, 1), np.nan)


def retrieval_sheet(
    ranking: Ranking,
    captions: Sequence[str],
    text_items: Int[np.ndarray, " T"],
    media: Media,
    png: Path | str,
    *,
    queries: int = 6,
    kind: str = "image",
) -> Path:
    """Draws the five best answers of some queries both ways, the right ones in green.

    Args:
        ranking: of `evaluation.ranking.rank`.
        captions, text_items: the texts of the gallery, and the item that each describes.
        media: item index → its frames, uint8 (F, H, W, 3); of a clip, up to four are shown, in reading order.
        png: where to write.
        queries: how many of each direction, taken at even distances through the gallery, not chosen.
        kind: "image" or "video", for the headings.
    """
    row, width, margin = 1.52, 11.0, 0.35  # inches
    texts = _evenly(len(captions), queries)
    items = _evenly(len(ranking.item_to_text.ids), queries)
    text_rows, item_rows = len(texts), math.ceil(len(items) / 2)
    height = 2 * margin + 0.7 + row * (text_rows + item_rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        page = figure.add_axes((0, 0, 1, 1))  # in inches from the top left
        page.set_xlim(0, width)
        page.set_ylim(height, 0)
        page.axis("off")
        top = margin
        _heading(page, margin, top, f"text → {kind}", ranking.text_to_item, text_items)
        for number, text in enumerate(texts):
            place = (margin, top + 0.3 + number * row)
            _text_query(page, place, captions[text], ranking.text_to_item, text, int(text_items[text]), media)
        top += 0.6 + text_rows * row
        item_answers = [np.flatnonzero(text_items == item) for item in range(len(ranking.item_to_text.ids))]
        _heading(page, margin, top, f"{kind} → text", ranking.item_to_text, item_answers)
        for number, item in enumerate(items):
            place = (margin + (number % 2) * 5.3, top + 0.3 + (number // 2) * row)
            _item_query(page, place, ranking.item_to_text, item, set(item_answers[item].tolist()), captions, media)
        return _save(figure, png)


def _evenly(total: int, count: int) -> list[int]:
    return [int(index) for index in np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))]


def _heading(page: Axes, x: float, y: float, title: str, top: Top, targets: Sequence | np.ndarray) -> None:
    right = np.mean([np.isin(ids[0], target) for ids, target in zip(top.ids, targets, strict=True)])
    text = page.text(x, y, title, fontsize=12, fontweight="bold", va="center")
    note = f"   {len(top.ids)} queries, the first answer is right for {100 * right:.0f} %"
    page.annotate(note, (1, 0.5), xycoords=text, va="center", color=GREY, fontsize=8.5)


def _text_query(
    page: Axes, place: tuple[float, float], caption: str, top: Top, text: int, item: int, media: Media
) -> None:
    x, y = place
    ids = top.ids[text]
    page.text(x, y + 0.06, _fold(caption, 38, 5), fontsize=9, va="top", linespacing=1.35)
    found = np.flatnonzero(ids == item)
    note = f"right answer at rank {found[0] + 1}" if found.size else f"right answer not among the first {len(ids)}"
    page.text(x, y + 1.1, note, fontsize=7, va="bottom", color=GREEN if found.size and found[0] == 0 else GREY)
    for number, (answer, score) in enumerate(zip(ids[:5], top.scores[text, :5], strict=True)):
        _thumbnail(page, (3.2 + number * 1.52, y), 1.1, media(int(answer)), GREEN if answer == item else None)
        color = GREEN if answer == item else GREY
        page.text(3.2 + number * 1.52, y + 1.18, f"{score:.2f}", fontsize=7, va="top", color=color)


def _item_query(
    page: Axes,
    place: tuple[float, float],
    top: Top,
    item: int,
    right: set[int],
    captions: Sequence[str],
    media: Media,
) -> None:
    x, y = place
    _thumbnail(page, (x, y), 1.1, media(item), None)
    for number, (answer, score) in enumerate(zip(top.ids[item, :5], top.scores[item, :5], strict=True)):
        is_right = int(answer) in right
        line = y + 0.11 + 0.22 * number
        page.text(
            x + 1.62, line, f"{score:.2f}", fontsize=7, va="center", ha="right", color=GREEN if is_right else GREY
        )
        caption = shortened(captions[int(answer)], 58)
        weight, color = ("bold", GREEN) if is_right else ("normal", INK)
        page.text(x + 1.7, line, caption, fontsize=7.5, va="center", color=color, fontweight=weight)


def _thumbnail(
    page: Axes, place: tuple[float, float], size: float, frames: UInt8[np.ndarray, "F H W 3"], frame_color: str | None
) -> None:
    """A picture, or a clip as two by two frames, fitted into a square; a coloured frame marks the right answer."""
    x, y = place
    shown = frames[_evenly(len(frames), 4)]
    per_row = 1 if len(shown) == 1 else 2
    gap = 0.03 if per_row == 2 else 0.0
    cell = (size - gap * (per_row - 1)) / per_row
    for number, picture in enumerate(shown):
        left = x + (number % per_row) * (cell + gap)
        upper = y + (number // per_row) * (cell + gap)
        scale = cell / max(picture.shape[:2])
        height, width = picture.shape[0] * scale, picture.shape[1] * scale
        left, upper = left + (cell - width) / 2, upper + (cell - height) / 2
        page.imshow(picture, extent=(left, left + width, upper + height, upper), interpolation="lanczos", aspect="auto")
    edge = 0.035 if frame_color else 0.0
    outline = {"fill": False, "edgecolor": frame_color or FAINT, "linewidth": 2.4 if frame_color else 0.6}
    page.add_patch(Rectangle((x - edge, y - edge), size + 2 * edge, size + 2 * edge, zorder=3, **outline))


def _fold(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def shortened(text: str, width: int) -> str:
    """A text of at most `width` characters: cut between words, or within one where it has no spaces."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    head = line[: width - 1]
    return (head.rpartition(" ")[0] or head[:-1]) + " …"


def _save(figure: Figure, png: Path | str) -> Path:
    path = Path(png)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
    return path
