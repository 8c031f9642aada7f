"""RandAugment (Cubuk et al., 2020, arXiv 1909.13719) on RGB images: operations drawn first, then applied.

The list and the ranges are those used for ViLT and METER (no inversion, no cut-out; magnitude 30 is the strongest),
with two corrections: severity grows with the magnitude for every operation (there, posterising and solarising grow
weaker), and colour operations go either way (there, magnitudes below 15 only ever darken and dull).
Operations run on the resized square, where they cost least; shifts are shares of its side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 30
_FILL = (122, 116, 104)  # CLIP's mean colour: what rotation and shift uncover is 0 after normalisation


@dataclass(frozen=True)
class Operation:
    """One drawn operation: its name in `OPERATIONS` and its signed severity, -1 to 1."""

    name: str
    severity: float

    def __call__(self, image: Image.Image) -> Image.Image:
        """Applies the operation to an RGB image."""
        return OPERATIONS[self.name](image, self.severity)


def draw_operations(count: int, magnitude: float, rng: np.random.Generator) -> tuple[Operation, ...]:
    """Draws `count` operations with replacement, each of severity magnitude/30 and a random sign.

    Raises:
        ValueError: count below 0 or magnitude outside 0 to 30.
    """
    if count < 0 or not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(f"rand_augment is ({count}, {magnitude}); use (operations, magnitude 0 to {MAX_MAGNITUDE})")
    names = tuple(OPERATIONS)
    severity = magnitude / MAX_MAGNITUDE
    return tuple(
        Operation(names[rng.integers(len(names))], severity if rng.random() < 0.5 else -severity) for _ in range(count)
    )


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """`matrix` maps output to input coordinates."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    )


def _rotate(image: Image.Image, severity: float) -> Image.Image:
    return image.rotate(30 * severity, resample=Image.Resampling.BILINEAR, fillcolor=_FILL)


def _solarize_add(image: Image.Image, severity: float) -> Image.Image:
    """Brightens the dark half of the range."""
    added = round(110 * abs(severity))
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, severity: enhancer(image).enhance(1 + 0.9 * severity)  # 1 leaves the image as it is


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, severity: ImageOps.autocontrast(image),
    "equalize": lambda image, severity: ImageOps.equalize(image),
    "rotate": _rotate,
    "posterize": lambda image, severity: ImageOps.posterize(image, 8 - round(4 * abs(severity))),
    "solarize": lambda image, severity: ImageOps.solarize(image, round(256 * (1 - abs(severity)))),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, severity: _affine(image, (1, 0.3 * severity, 0, 0, 1, 0)),
    "shear_y": lambda image, severity: _affine(image, (1, 0, 0, 0.3 * severity, 1, 0)),
    "translate_x": lambda image, severity: _affine(image, (1, 0, severity / 6 * image.width, 0, 1, 0)),
    "translate_y": lambda image, severity: _affine(image, (1, 0, 0, 0, 1, severity / 6 * image.height)),
}
