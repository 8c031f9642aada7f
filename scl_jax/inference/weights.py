"""Parameters, sizes and tokenizer of a trained model, whatever they were saved as.

| source | what it holds |
|---|---|
| a work directory, or a folder of `scl_jax.convert` | config.json, checkpoints/ (or their running average), classes |
| an exported PyTorch folder, or the file in it | model.safetensors, config.json, the tokenizer, classes |
| any other `.ckpt`, `.pt`, `.bin`, `.safetensors` | weights under the reference's names |
| `owner/name` or `hub:owner/name` | one of the folders on the Hugging Face hub |

classes.json lists the answers of the head, where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from scl_jax import build
from scl_jax.config import config_of_run
from scl_jax.convert.adapt import fit
from scl_jax.convert.checkpoints import is_run, read_parameters
from scl_jax.convert.inputs import (
    DEFAULT_TOKENIZER,
    check_tokenizer,
    config_of,
    inputs_of,
    own_tokenizer,
    read_classes,
)
from scl_jax.convert.sources import locate
from scl_jax.convert.to_flax import read_torch
from scl_jax.data.tokens import Tokenizer, load_run_tokenizer, load_tokenizer
from scl_jax.models import parameters
from scl_jax.models.scl import PRETRAINING_HEADS, SCL, SCLConfig

ALL_HEADS = (*PRETRAINING_HEADS, "vqa", "nlvr2", "entailment", "rank")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a source holds."""

    name: str
    make: partial[SCL]  # the network with exactly the heads that the weights have
    flat: dict[str, np.ndarray]  # its parameters by dotted path
    heads: tuple[str, ...]
    attention_heads: tuple[int, int, int]  # of vision, text and fusion, which parameters do not show
    tokenizer: Tokenizer
    text_length: int  # tokens
    image_size: int  # pixels
    video_size: int
    video_frames: int
    answers: tuple[str, ...]  # of visual question answering, in the order of the head's classes; may be unknown


def read_weights(
    source: str, *, tokenizer: str = "", step: int | None = None, dtype: str = "", heads: int = 0, vision_heads: int = 0
) -> Weights:
    """Reads a source of the table above.

    Args:
        tokenizer: folder or hub name; empty: the source's own, else roberta-base.
        step: of a work directory's checkpoint; None: the newest.
        dtype: of activations, float32 or bfloat16; empty: the run's, float32 for PyTorch weights.
        heads, vision_heads: of attention, for bare PyTorch files, which do not tell; 0: width / 64.

    Raises:
        FileNotFoundError: there is no such source, step or tokenizer.
        ConversionError, TorchFileError: weights that cannot be used, with every key concerned, or a tokenizer with more
            tokens than they have.
    """
    path = locate(source)
    if path.is_dir() and is_run(path):
        flat, _ = read_parameters(path, step)
        config = config_of_run(path)
        named = config.data.tokenizer or f"{config.data.dir}/tokenizer"
    else:
        if path.is_dir() and (path / "config.json").exists() and not _has_torch_weights(path):
            raise FileNotFoundError(f"{path}: a run without a checkpoint yet, or a folder of something else")
        flat, sizes, _ = read_torch(path, heads, vision_heads)
        named = str(own_tokenizer(path) or DEFAULT_TOKENIZER)
        config = config_of(path, sizes, named)
    config.model.attention = "auto"  # the run's may be a kernel of another platform, or of another type
    if dtype:
        config.model.dtype = dtype
    shapes = {name: tuple(value.shape) for name, value in flat.items()}
    sizes = with_heads(build.model_config(config), shapes)
    make = partial(SCL, sizes)
    expected = {k: tuple(v.shape) for k, v in parameters.flatten(parameters.abstract(make)[1]).items()}
    fitted, _ = fit(flat, expected)
    found = load_tokenizer(tokenizer) if tokenizer else load_run_tokenizer(path, named)
    check_tokenizer(found, config.model.text.vocab_size)
    return Weights(
        name=source,
        make=make,
        flat=fitted,
        heads=sizes.heads,
        attention_heads=tuple(config.model[part].heads for part in ("vision", "text", "fusion")),
        tokenizer=found,
        **dataclasses.asdict(inputs_of(config)),
        answers=read_classes(path),
    )


def with_heads(sizes: SCLConfig, shapes: Mapping[str, tuple[int, ...]]) -> SCLConfig:
    """`sizes` with the heads, token types and number of answers that `shapes` (by path) have."""
    types = shapes.get("fusion.token_type", (2,))[0]
    return dataclasses.replace(
        sizes,
        fusion=dataclasses.replace(sizes.fusion, token_types=types),
        heads=tuple(name for name in ALL_HEADS if _has(name, shapes)),
        answers=shapes.get("vqa.out.bias", (sizes.answers,))[0],
    )


def _has(head: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(path.startswith(f"{head}.") for path in shapes)


def _has_torch_weights(path: Path) -> bool:
    return any(path.glob("*.safetensors*")) or any(path.glob("pytorch_model*"))
