"""The alignment scores; what they are is pinned down in `scl_jax.evaluation.alignment`.

Axes: F frames, H W pixels, R C rows and columns of patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from scl_jax.models.vision import bicubic_matrix

LARGE = 0.9  # share of the image above which a box is background
KINDS = ("box", "mask")


class Attention(Protocol):
    """Where a text looks, such as `scl_jax.inference.AttentionMap`."""

    @property
    def overall(self) -> Float[np.ndarray, "F R C"]:
        """The map of the text's [CLS]."""
        ...

    def phrase(self, start: int, end: int) -> Float[np.ndarray, "F R C"]:
        """The map of these characters of the caption; ValueError where the model reads none of them."""
        ...


@dataclasses.dataclass(frozen=True)
class Region:
    """Where one thing is: a box x0, y0, x1, y1 in pixels a frame, x1 and y1 just outside, and a mask."""

    boxes: Int[np.ndarray, "F 4"]
    mask: Bool[np.ndarray, "F H W"]

    def is_large(self) -> bool:
        """Whether its boxes cover more than 90 % of the image, on the average of frames."""
        width, height = self.boxes[:, 2] - self.boxes[:, 0], self.boxes[:, 3] - self.boxes[:, 1]
        return float((width * height).mean()) > LARGE * self.mask.shape[1] * self.mask.shape[2]

    def filled(self) -> Bool[np.ndarray, "F H W"]:
        """The boxes as masks."""
        filled = np.zeros(self.mask.shape, bool)
        for frame, (x0, y0, x1, y1) in enumerate(self.boxes.clip(min=0).tolist()):
            filled[frame, y0:y1, x0:x1] = True
        return filled


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A noun phrase, its characters `start` to `end` (past the last) in the caption, and its regions."""

    text: str
    span: tuple[int, int] | None  # None: it does not stand in the caption
    regions: tuple[Region, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """An image or clip (an encoded file), its caption, and where each phrase of it is."""

    name: str
    media: bytes
    caption: str
    phrases: tuple[Phrase, ...]


def resize_mask(
    mask: Float[np.ndarray, "F H W"] | Bool[np.ndarray, "F H W"], rows: int, columns: int
) -> Float[np.ndarray, "F R C"]:
    """A mask on the grid of patches: torch's bicubic interpolation without antialiasing, not clipped."""
    down, across = bicubic_matrix(mask.shape[1], rows), bicubic_matrix(mask.shape[2], columns)
    return down @ mask.astype(np.float64) @ across.T


def attention_share(attention: Float[np.ndarray, "F R C"], region: Float[np.ndarray, "F R C"]) -> float:
    """The share of the attention that lies in a region: sum of A · R / sum of A.

    Raises:
        ValueError: there is no attention, or it is not finite.
    """
    attention = np.asarray(attention, np.float64)
    total = attention.sum()
    if not np.isfinite(total) or total <= 0:
        raise ValueError(f"the attention sums to {total}: look for parameters that are not finite")
    return float((attention * region).sum() / total)


def score_example(attention: Attention, example: Example, drop_large_masks: bool = False) -> dict[str, Any]:
    """All scores of one image or clip; None where there is nothing to score.

    Args:
        attention: of the example's caption to its media; a map's frames are those of the regions.

    Returns:
        name, caption, "global", "local" and their "uniform" counterparts by kind ("box", "mask"), the same for each
        phrase under "phrases", and the texts of phrases without a score under "missing".
    """
    found: dict[str, Any] = {"name": example.name, "caption": example.caption, "phrases": [], "missing": []}
    overall = attention.overall
    regions = [region for phrase in example.phrases for region in phrase.regions]
    small = [region for region in regions if not region.is_large()]
    whole = {"box": small, "mask": small if drop_large_masks else regions}
    found["global"], found["global_uniform"] = _both(overall, whole)
    for phrase in example.phrases:
        try:
            if phrase.span is None:
                raise ValueError("not in the caption")
            own = attention.phrase(*phrase.span)
        except ValueError:
            found["missing"].append(phrase.text)
            continue
        local, uniform = _both(own, {"box": phrase.regions, "mask": phrase.regions})
        found["phrases"].append({"phrase": phrase.text, "local": local, "local_uniform": uniform})
    for name in ("local", "local_uniform"):
        found[name] = {kind: _mean(phrase[name][kind] for phrase in found["phrases"]) for kind in KINDS}
    return found


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over images, such as `local/box`, those of uniform attention beside them, and how many had a score."""
    summary: dict[str, Any] = {"images": len(results), "missing_phrases": sum(len(one["missing"]) for one in results)}
    for name in ("global", "local"):
        for kind in KINDS:
            values = [one[name][kind] for one in results]
            summary[f"{name}/{kind}"] = _mean(values)
            summary[f"{name}/{kind}/uniform"] = _mean(one[f"{name}_uniform"][kind] for one in results)
            summary[f"{name}/{kind}/images"] = sum(value is not None for value in values)
    return summary


def _both(
    attention: Float[np.ndarray, "F R C"], regions_of: Mapping[str, Sequence[Region]]
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """By kind: the score of the attention map, and that of uniform attention."""
    scores: dict[str, float | None] = {}
    uniform: dict[str, float | None] = {}
    for kind, regions in regions_of.items():
        masks = [region.filled() if kind == "box" else region.mask for region in regions]
        if not masks:
            scores[kind] = uniform[kind] = None
            continue
        grid = resize_mask(np.logical_or.reduce(masks), *attention.shape[1:])
        scores[kind], uniform[kind] = attention_share(attention, grid), float(grid.mean())
    return scores, uniform


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
