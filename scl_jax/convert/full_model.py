"""A whole SCL model under the reference's names → parameters at the sizes that the weights themselves have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import numpy as np

from scl_jax.convert.rules import DROPS, RULES, ConversionError, Report, torch_to_flax
from scl_jax.convert.torch_config import SCLConfig
from scl_jax.models import parameters, scl
from scl_jax.models.fusion import FusionConfig
from scl_jax.models.text import TextConfig
from scl_jax.models.vision import VisionConfig

MAY_MISS = (r"vision\.(temporal|mask)_embedding",)
DEFAULT_FRAMES = 8  # temporal rows of the method


def model_shapes(sizes: SCLConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by dotted path, of a model with the heads of `sizes`."""
    c = sizes
    text = TextConfig(c.width, c.text_layers, c.heads, c.mlp_width, c.vocab_size, c.max_positions)
    vision = VisionConfig(
        c.vision_width, c.vision_layers, c.vision_heads, c.vision_mlp_width, c.patch_size, c.image_size,
        c.max_frames or DEFAULT_FRAMES,
    )  # fmt: skip
    fusion = FusionConfig(c.width, c.fusion_layers, c.heads, c.mlp_width, c.token_types)
    config = scl.SCLConfig(
        vision, text, fusion, c.projection_width, c.initial_temperature, heads=c.with_heads, answers=c.answers
    )
    shapes = parameters.flatten(parameters.abstract(partial(scl.SCL, config))[1])
    return {path: tuple(x.shape) for path, x in shapes.items()}


def read_model(
    tensors: Mapping[str, np.ndarray], heads: int = 0, vision_heads: int = 0, seed: int = 0
) -> tuple[dict[str, np.ndarray], SCLConfig, Report]:
    """Weights under the reference's names → parameters, their sizes, and what became of each key.

    Temporal rows that are absent (weights for images) are zeros; an absent mask vector (weights for video) is drawn
    with `seed`. `report.untouched` names both.

    Args:
        heads, vision_heads: of attention, which the shapes do not tell; 0: width / 64.

    Raises:
        ConversionError: keys that are missing, unknown, of another shape, or hold NaN or infinity.
    """
    sizes = SCLConfig.infer({name: value.shape for name, value in tensors.items()})
    sizes = dataclasses.replace(sizes, heads=heads or sizes.heads, vision_heads=vision_heads or sizes.vision_heads)
    for width, count, side in (
        (sizes.width, sizes.heads, "heads"),
        (sizes.vision_width, sizes.vision_heads, "vision_heads"),
    ):
        if count < 1 or width % count:
            raise ConversionError(f"width {width} does not divide by {count} heads; give --{side}")
    if min(sizes.vision_layers, sizes.text_layers, sizes.fusion_layers) < 1:
        raise ConversionError("not a full SCL model: vision, text or fusion layers are missing")
    if sizes.image_size < sizes.patch_size:
        raise ConversionError("vision_transformer.visual.positional_embedding has no row for a patch")
    shapes = model_shapes(sizes)
    found, report = torch_to_flax(tensors, shapes, rules=RULES, drops=DROPS, may_miss=MAY_MISS)
    for path in report.untouched:
        found[path] = np.zeros(shapes[path], np.float32)
        if path == "vision.mask_embedding":
            scale = sizes.vision_width**-0.5
            found[path] = np.random.default_rng(seed).normal(0, scale, shapes[path]).astype(np.float32)
    return found, dataclasses.replace(sizes, max_frames=sizes.max_frames or DEFAULT_FRAMES, mask_vector=True), report
