"""What training starts from: `config.init.checkpoint`, `config.init.vision` and `config.init.text`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from scl_jax.config import differences
from scl_jax.convert import adapt
from scl_jax.convert.checkpoints import is_run, read_parameters
from scl_jax.convert.encoders import read_clip, read_roberta
from scl_jax.convert.inputs import noted_sizes, why_other_classes
from scl_jax.convert.rules import ConversionError, Report
from scl_jax.convert.sources import (
    CLIP_SETTINGS,
    ROBERTA_SETTINGS,
    check_finite,
    check_settings,
    locate,
    read_weights,
)
from scl_jax.convert.to_flax import INITIALISED, read_torch
from scl_jax.models import parameters
from scl_jax.models.parameters import Params
from scl_jax.task_config import HEADS

SIZES = r"\S+\.(width|layers|heads|mlp_width|patch_size|vocab_size|max_positions|projection_width):"
Shapes = Mapping[str, tuple[int, ...]]


def initial_parameters(
    config: ConfigDict, params: Params, complete: bool = False, classes: tuple[str, ...] = ()
) -> tuple[Params, list[str]]:
    """Fills the weights that `config.init` names into fresh parameters, each leaf where it lies on the mesh.

    A checkpoint (a run, a converted folder or a torch file) fills everything it has; then vision (CLIP) and text
    (RoBERTa) fill their encoder. What none of them has stays as it is.

    Args:
        complete: no head may stay as it is, because it is to be evaluated.
        classes: what the task's head tells apart, in its order; a head of the checkpoint has to list the same ones,
            where it lists them.

    Returns:
        The parameters, and lines for the log: what was loaded, resized, dropped, left as initialised.

    Raises:
        ConversionError, TorchFileError, FileNotFoundError: naming the option, the file and the keys.
    """
    flat = parameters.flatten(params)
    shapes = {path: tuple(x.shape) for path, x in flat.items()}
    loaded: dict[str, np.ndarray] = {}
    lines: list[str] = []
    for option, read in (("checkpoint", _checkpoint), ("vision", _vision), ("text", _text)):
        source = config.init[option]
        if not source:
            continue
        try:
            found, notes = read(locate(source), shapes, config)
            if classes and any(path.startswith(f"{config.task}.") for path in found):
                _check_classes(locate(source), classes)
        except ValueError as error:
            raise ConversionError(f"config.init.{option} = {source}: {error}") from error
        loaded |= found
        lines += [f"init.{option} = {source}: {len(found)} of {len(flat)} parameters", *notes]
    if not loaded:
        return params, []
    fresh = sorted({path.split(".")[0] if "." in path else path for path in set(flat) - set(loaded)})
    heads = [part for part in fresh if part in HEADS[config.task]]
    if complete and heads:
        raise ConversionError(
            f"config.init.checkpoint = {config.init.checkpoint} has no head {', '.join(heads)}, which task "
            f"{config.task} evaluates: fine-tune from it (--mode=train), or evaluate a checkpoint of this task"
        )
    if fresh:
        lines.append(f"as initialised: (some of) {', '.join(fresh)}")
    return parameters.unflatten({path: _place(x, loaded.get(path)) for path, x in flat.items()}), lines


def _check_classes(path: Path, classes: tuple[str, ...]) -> None:
    reason = why_other_classes(path, classes)
    if reason:
        raise ConversionError(reason)


def _place(old: jax.Array, new: np.ndarray | None) -> jax.Array:
    if new is None:
        return old
    new = np.asarray(new, old.dtype)
    return jax.make_array_from_callback(old.shape, old.sharding, lambda index: new[index])


def _checkpoint(path: Path, shapes: Shapes, config: ConfigDict) -> tuple[dict[str, np.ndarray], list[str]]:
    if path.is_dir() and is_run(path):
        flat, _ = read_parameters(path)
        try:
            fitted = adapt.fit(flat, shapes)
        except ConversionError as error:
            raise ConversionError(f"{_other_sizes(path, config)}{error}") from error
        if heads := _other_sizes(path, config, r"\S+\.heads:"):  # the same shapes, but other numbers
            raise ConversionError(f"{heads}choose another checkpoint")
        return fitted
    if noted := noted_sizes(path):
        m = config.model
        for part, count in (("vision", noted.vision_heads), ("text", noted.heads), ("fusion", noted.heads)):
            if m[part].heads != count:
                raise ConversionError(f"its attention has other heads: set config.model.{part}.heads to {count}")
    flat, _, report = read_torch(path, config.model.text.heads, config.model.vision.heads)
    fitted, steps = adapt.fit(flat, shapes)
    for name in ["vision.mask_embedding"]:  # absent in the file: the fresh one is as good
        if name in report.untouched:
            fitted.pop(name, None)
    return fitted, [*steps, *_notes(report), *(f"{name}: {INITIALISED[name]}" for name in report.untouched)]


def _other_sizes(run: Path, config: ConfigDict, names: str = SIZES) -> str:
    """What its config.json says of another network: the cause of shapes that do not fit."""
    file = run / "config.json"
    found = json.loads(file.read_text())["model"] if file.exists() else {}
    wanted = json.loads(config.model.to_json())
    changed = [line for line in differences(found, wanted, "model.") if re.match(names, line)] if found else []
    return f"another network ({'; '.join(changed)}): set these options to the checkpoint's, or " if changed else ""


def _vision(path: Path, shapes: Shapes, config: ConfigDict) -> tuple[dict[str, np.ndarray], list[str]]:
    tensors = read_weights(path)
    flat, report = read_clip(tensors, shapes)
    check_settings(path, {**CLIP_SETTINGS, "num_attention_heads": config.model.vision.heads})
    return _encoder(path, tensors, "vision.", shapes, flat, report)


def _text(path: Path, shapes: Shapes, config: ConfigDict) -> tuple[dict[str, np.ndarray], list[str]]:
    tensors = read_weights(path)
    flat, report = read_roberta(tensors, shapes)
    check_settings(path, {**ROBERTA_SETTINGS, "num_attention_heads": config.model.text.heads})
    return _encoder(path, tensors, "text.", shapes, flat, report)


def _encoder(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    part: str,
    shapes: Shapes,
    flat: dict[str, np.ndarray],
    report: Report,
) -> tuple[dict[str, np.ndarray], list[str]]:
    check_finite(tensors, report.mapped, path)
    own = {name: shape for name, shape in shapes.items() if name.startswith(part) and name not in report.untouched}
    fitted, steps = adapt.fit(flat, own)
    return fitted, [*steps, *_notes(report)]


def _notes(report: Report) -> list[str]:
    reasons: dict[str, int] = {}
    for reason in report.dropped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return [f"dropped {count} tensor(s): {reason}" for reason, count in sorted(reasons.items())]
