"""PyTorch → Orbax: a file or folder under the reference's names becomes a folder that training starts from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scl_jax.convert.adapt import fit
from scl_jax.convert.checkpoints import beside, check_target, checksum, write_parameters
from scl_jax.convert.full_model import model_shapes, read_model
from scl_jax.convert.inputs import DEFAULT_TOKENIZER, classes_file, config_of, own_tokenizer
from scl_jax.convert.rules import Report
from scl_jax.convert.sources import check_finite, read_weights
from scl_jax.convert.summary import Summary
from scl_jax.convert.torch_config import SCLConfig
from scl_jax.data.tokens import RUN_TOKENIZER, Tokenizer, load_tokenizer

INITIALISED = {
    "vision.temporal_embedding": "zeros (weights for images have no temporal rows)",
    "vision.mask_embedding": "drawn at random (weights for video have no mask vector); train it before you rely on it",
}


def read_torch(path: Path, heads: int = 0, vision_heads: int = 0) -> tuple[dict[str, np.ndarray], SCLConfig, Report]:
    """A full model from a torch file or folder, float32 and finite.

    What weights do not show (heads, dropout, the temperature at the start) is the folder's config.json's, if there.
    """
    tensors = read_weights(path)
    file, noted = path / "config.json", SCLConfig()
    if path.is_dir() and file.exists():  # written by this command: it knows the heads
        settings = json.loads(file.read_text())
        if "vision_heads" in settings:
            noted = SCLConfig.from_dict(settings)
            heads, vision_heads = heads or noted.heads, vision_heads or noted.vision_heads
    flat, sizes, report = read_model(tensors, heads, vision_heads)
    sizes = dataclasses.replace(sizes, dropout=noted.dropout, initial_temperature=noted.initial_temperature)
    check_finite(tensors, report.mapped, path)
    return flat, sizes, report


def to_flax(
    path: Path,
    target: Path,
    *,
    heads: int = 0,
    vision_heads: int = 0,
    image_size: int = 0,
    frames: int = 0,
    tokenizer: str = "",
    overwrite: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Summary:
    """Converts a torch file or folder and writes <target>/config.json, <target>/checkpoints/0 and the tokenizer.

    Args:
        heads, vision_heads: of attention; 0: those in the folder's config.json, or width / 64.
        image_size, frames: resize the position table for images and clips of this side (pixels), and the temporal
            rows for clips of as many frames; 0: keep, and take the inputs that the folder notes.
        tokenizer: a folder, which is copied, or a hub name, which is written into the config; empty: the tokenizer
            beside the weights, or roberta-base.

    Raises:
        ConversionError, TorchFileError, FileExistsError, OSError, ValueError: with the key or file concerned; nothing
            is written.
    """
    if not dry_run:
        check_target(target, overwrite)
    flat, sizes, report = read_torch(path, heads, vision_heads)
    sizes = dataclasses.replace(sizes, image_size=image_size or sizes.image_size, max_frames=frames or sizes.max_frames)
    flat, resized = fit(flat, model_shapes(sizes))
    summary = Summary(
        str(path), str(target), len(report.mapped), sum(x.size for x in flat.values()), resized, report.dropped,
        [f"{name}: {INITIALISED[name]}" for name in report.untouched], checksum(flat),
    )  # fmt: skip
    for line in summary.lines():
        say(line)
    if not dry_run:
        copied, named = _tokenizer(path, tokenizer)
        config = config_of(path, sizes, named, image_size=image_size, frames=frames)
        with beside(target, overwrite, sum(x.nbytes for x in flat.values())) as folder:
            write_parameters(folder, flat)
            (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            if copied:
                copied.save(folder / RUN_TOKENIZER)
            if classes_file(path).exists():  # the answers of a head
                shutil.copy(classes_file(path), folder / "classes.json")
    return summary


def _tokenizer(path: Path, asked: str) -> tuple[Tokenizer | None, str]:
    """The tokenizer to copy, where it lies in a folder, and its name for the config (empty: the copy)."""
    folder = Path(asked).expanduser() if asked else own_tokenizer(path)
    if folder and folder.is_dir():
        return load_tokenizer(folder), ""
    return None, asked or DEFAULT_TOKENIZER
