"""What a model takes in: the sizes of its inputs and its tokenizer, for everything that loads or converts weights.

A run has them in its config. A PyTorch folder of ours notes them in its config.json; other PyTorch weights tell the
rows of their tables only. Whether weights are loaded, converted or exported, the rules are the same, and stand here.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scl_jax.config import active_streams, default_config
from scl_jax.convert.rules import ConversionError
from scl_jax.convert.sources import settings_of
from scl_jax.convert.torch_config import SCLConfig
from scl_jax.data.tokens import Tokenizer

DEFAULT_TOKENIZER, DEFAULT_VOCABULARY = "roberta-base", 50265  # and its tokens
MODEL_TYPE = "scl"  # in the config.json of an exported folder
_VIDEO_FRAMES = 4  # of METHOD section 4, for weights that come without a note
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tokens of a text; sides in pixels of an image and of a clip's frames; frames of a clip."""

    text_length: int
    image_size: int
    video_size: int
    video_frames: int


def inputs_of(config: ConfigDict) -> Inputs:
    """What a model of this config is given; a model of clips alone sees images at the size of its clips.

    Texts are no longer than the table of positions, clips have no more frames than there are temporal rows.
    """
    images, videos = config.data.images, config.data.videos
    if active_streams(config) == ["videos"]:
        images = videos
    return Inputs(
        text_length=min(config.data.text_length, config.model.text.max_positions - 2),
        image_size=images.image_size,
        video_size=videos.image_size,
        video_frames=min(max(2, videos.frames), config.model.vision.max_frames),
    )


def config_of(
    path: Path, sizes: SCLConfig, tokenizer: str = DEFAULT_TOKENIZER, *, image_size: int = 0, frames: int = 0
) -> ConfigDict:
    """The default config with the model's sizes and inputs: what a run needs to take these PyTorch weights up.

    Args:
        path: the folder of the weights, or a file in it; the folder's config.json may note the inputs.
        sizes: of the model, after all resizing.
        image_size, frames: of images and of clips, whatever is noted; 0: as noted, else as many as the tables hold.

    Raises:
        ConversionError: the note cannot be read.
    """
    config = default_config()
    m, s = config.model, sizes
    m.dtype = "float32"  # whoever loads the weights computes what their owner did
    m.vision.update(
        width=s.vision_width, layers=s.vision_layers, heads=s.vision_heads, mlp_width=s.vision_mlp_width,
        patch_size=s.patch_size, image_size=s.image_size, max_frames=s.max_frames,
    )  # fmt: skip
    m.text.update(
        width=s.width, layers=s.text_layers, heads=s.heads, mlp_width=s.mlp_width, vocab_size=s.vocab_size,
        max_positions=s.max_positions,
    )  # fmt: skip
    m.fusion.update(width=s.width, layers=s.fusion_layers, heads=s.heads, mlp_width=s.mlp_width)
    m.update(projection_width=s.projection_width, dropout=s.dropout, initial_temperature=s.initial_temperature)
    noted = _noted(path)
    config.data.tokenizer = tokenizer
    config.data.text_length = min(noted.text_length if noted else config.data.text_length, s.max_positions - 2)
    config.data.images.image_size = image_size or (noted.image_size if noted else s.image_size)
    config.data.videos.update(
        image_size=image_size or (noted.video_size if noted else s.image_size),
        frames=min(frames or (noted.video_frames if noted else _VIDEO_FRAMES), s.max_frames),
    )
    return config


def own_tokenizer(path: Path) -> Path | None:
    """The folder of PyTorch weights, or of a file of them, if it holds a tokenizer."""
    folder = path if path.is_dir() else path.parent
    return folder if any((folder / name).exists() for name in _TOKENIZER_FILES) else None


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConversionError for a tokenizer whose ids lie beyond a model's table of words, which would give NaN."""
    if tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            f"the tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, but the model knows {vocab_size}: "
            "give the one that it was trained with (--tokenizer=FOLDER; in Python, tokenizer=...)"
        )


def classes_file(path: Path) -> Path:
    """Where the answers of a head would be listed."""
    return path / "classes.json" if path.is_dir() else path.with_name("classes.json")


def read_classes(path: Path) -> tuple[str, ...]:
    """The answers or labels of a head in its order, as they are listed beside these weights; none where they are not.

    Raises:
        ConversionError: the list cannot be read.
    """
    file = classes_file(path)
    if not file.exists():
        return ()
    try:
        return tuple(map(str, json.loads(file.read_text())))
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{file}: a JSON list of answers is expected ({error})") from error


def why_other_classes(path: Path, classes: tuple[str, ...]) -> str:
    """Why a head beside these weights does not tell apart `classes` in their order; "" where it does or may.

    Raises:
        ConversionError: its list cannot be read.
    """
    known = read_classes(path)
    if not known or known == classes:
        return ""
    pairs = enumerate(itertools.zip_longest(known, classes))
    number, (there, here) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    there, here = ("missing" if name is None else repr(name) for name in (there, here))
    return (
        f"{classes_file(path)} lists {len(known)} classes, the data have {len(classes)}, and class {number} is {there} "
        f"there and {here} in the data, so that one would be taken for the other; name the data that it was trained "
        "on, as they were prepared then"
    )


def noted_sizes(path: Path) -> SCLConfig | None:
    """The sizes in the config.json of an exported folder, or of a file in it: also what weights do not show, as heads.

    Raises:
        ConversionError, ValueError: it cannot be read, or lacks some of them.
    """
    _, settings = _settings(path)
    return SCLConfig.from_dict(settings) if "vision_heads" in settings else None


def _noted(path: Path) -> Inputs | None:
    """What an exported folder notes about the run that it came from."""
    file, settings = _settings(path)
    noted = settings.get("inputs")
    if not isinstance(noted, dict):
        return None
    try:
        return Inputs(**{field.name: int(noted[field.name]) for field in dataclasses.fields(Inputs)})
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"{file}: the inputs of the model cannot be read ({error!r})") from error


def _settings(path: Path) -> tuple[Path, dict[str, Any]]:
    """The config.json of a folder, or ours beside a file, and what it holds: nothing where there is none."""
    file, settings = settings_of(path)
    if path.is_file() and settings.get("model_type") != MODEL_TYPE:  # it is of something else
        return file, {}
    return file, settings
