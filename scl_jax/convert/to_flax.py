"""PyTorch → Orbax: a file or folder under the reference's names becomes a folder that training starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scl_jax.convert.adapt import fit
from scl_jax.convert.checkpoints import CONVERTED, beside, check_target, checksum, write_parameters
from scl_jax.convert.full_model import model_shapes, read_model
from scl_jax.convert.inputs import (
    DEFAULT_TOKENIZER,
    DEFAULT_VOCABULARY,
    check_tokenizer,
    classes_file,
    config_of,
    noted_sizes,
    own_tokenizer,
)
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

    What weights do not show (heads, dropout, the temperature at the start) is that of the config.json of an exported
    folder, whether the folder is named or the file in it.
    """
    tensors, noted = read_weights(path), noted_sizes(path)
    if noted:
        heads, vision_heads = heads or noted.heads, vision_heads or noted.vision_heads
    flat, sizes, report = read_model(tensors, heads, vision_heads)
    if noted:
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
        heads, vision_heads: of attention; 0: those in the exported folder's config.json, or width / 64.
        image_size, frames: resize the position table for images and clips of this side (pixels), and the temporal
            rows for clips of as many frames; 0: keep, and take the inputs that the folder notes.
        tokenizer: a folder, which is copied, or a hub name, which is written into the config; empty: the tokenizer
            beside the weights, or roberta-base.

    Raises:
        ConversionError, TorchFileError, FileExistsError, OSError, ValueError: with the key or file concerned; nothing
            is written.
    """
    numbers = {"heads": heads, "vision_heads": vision_heads, "image_size": image_size, "frames": frames}
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"--{name}={number}: a number from 1 on is expected")
    sources = [path, *filter(None, [tokenizer])]
    if not dry_run:
        check_target(target, overwrite, CONVERTED, sources)
    flat, sizes, report = read_torch(path, heads, vision_heads)
    sizes = dataclasses.replace(sizes, image_size=image_size or sizes.image_size, max_frames=frames or sizes.max_frames)
    flat, resized = fit(flat, model_shapes(sizes))
    summary = Summary(
        str(path), str(target), len(report.mapped), sum(x.size for x in flat.values()), resized, report.dropped,
        [f"{name}: {INITIALISED[name]}" for name in report.untouched], checksum(flat),
    )  # fmt: skip
    copied, named, tokenizer_line = _tokenizer(path, tokenizer, sizes.vocab_size)
    for line in [*summary.lines(), _heads_line(path, sizes, heads, vision_heads), tokenizer_line]:
        say(line)
    if not dry_run:
        config = config_of(path, sizes, named, image_size=image_size, frames=frames)
        with beside(target, overwrite, sum(x.nbytes for x in flat.values()), CONVERTED, sources) as folder:
            write_parameters(folder, flat)
            (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            if copied:
                copied.save(folder / RUN_TOKENIZER)
            if classes_file(path).exists():  # the answers of a head
                shutil.copy(classes_file(path), folder / "classes.json")
    return summary


def _heads_line(path: Path, sizes: SCLConfig, asked: int, asked_vision: int) -> str:
    """How many heads, and who says so: attention with others gives other numbers, and no error."""
    guess = "config.json" if noted_sizes(path) else "width / 64; --heads, --vision_heads"
    text, vision = ("as asked" if given else guess for given in (asked, asked_vision))
    first = "" if text == vision else f" ({text})"
    return f"heads: text and fusion {sizes.heads}{first}, vision {sizes.vision_heads} ({vision})"


def _tokenizer(path: Path, asked: str, vocab_size: int) -> tuple[Tokenizer | None, str, str]:
    """The tokenizer to copy, where it lies in a folder; its name for the config (empty: the copy); a line about it.

    Raises:
        ConversionError: it has more tokens than the model.
    """
    folder = Path(os.path.expanduser(asked)) if asked else own_tokenizer(path)
    if folder and folder.is_dir():
        found = load_tokenizer(folder)
        check_tokenizer(found, vocab_size)
        return found, "", f"tokenizer: copied from {folder}"
    if asked:
        with contextlib.suppress(FileNotFoundError):  # without a connection it is taken as it is
            check_tokenizer(load_tokenizer(asked), vocab_size)
        return None, asked, f"tokenizer: {asked}"
    line = f"tokenizer: {DEFAULT_TOKENIZER} (--tokenizer)"
    if vocab_size < DEFAULT_VOCABULARY:
        line += f"; it cannot be this one, whose {DEFAULT_VOCABULARY} tokens are more than the model's {vocab_size}"
    return None, DEFAULT_TOKENIZER, line
