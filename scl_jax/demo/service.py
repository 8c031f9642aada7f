"""What the page answers, without the page: files and texts of strangers in, numbers and pictures out.

Everything that a user can do wrong raises a `ValueError` or `OSError` with a sentence for that user; file names are
theirs, never a path of the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from scl_jax.data import images
from scl_jax.inference import MediaError, MissingHeadError, Model, TextError
from scl_jax.inference.media import IMAGE_ENDINGS, VIDEO_ENDINGS, clip_frames
from scl_jax.plots_attention import ALL, overlay, word_maps
from scl_jax.search import Index

DEFAULT_UPLOAD = 20  # MiB
MOST_ANSWERS = 24  # of a search
NO_FOLDER = "there is no folder to search: start the demo with --folder=pictures"
_MAP_SIDE = 448  # pixels of the longer side of an overlay
_THUMBNAIL = 320
_LARGEST_SHOWN = 1024
_KINDS = "Pictures may be JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF files"
_HOW = {  # what makes a checkpoint that has a head
    "contrastive": "a run of pre-training, such as runs/quickstart",
    "matching": "a run of pre-training, such as runs/quickstart",
    "masked_language": "a run of pre-training, such as runs/quickstart",
    "vqa": "a run of configs/vqa.py, such as runs/vqa_toy",
}
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Sight:
    """What a model makes of a picture and a text."""

    match: float | None  # probability that they belong together; None: no matching head
    similarity: float | None  # cosine; None: no contrastive head
    maps: list[tuple[Image.Image, str]]  # the whole text's attention over the picture, then each word's


@dataclasses.dataclass(frozen=True)
class Hit:
    """A file that a search found."""

    picture: Image.Image
    name: str  # relative to the folder
    similarity: float  # cosine


class Service:
    """Answers from one or several checkpoints: for each question the first that has the head for it.

    Args:
        models: one at least.
        index: of a folder, built with one of them; None: nothing to search.
        largest_upload: MiB of a file.

    Raises:
        ValueError: no model is given, or the index was built with another.
    """

    def __init__(self, models: Sequence[Model], index: Index | None = None, largest_upload: float = DEFAULT_UPLOAD):
        if not models:
            raise ValueError("name at least one checkpoint")
        self.models, self.index, self.largest_upload = tuple(models), index, largest_upload
        if index is not None:
            index.check(self.with_head("contrastive"))

    @property
    def names(self) -> list[str]:
        """Of the checkpoints, without the folders of the server that they lie in."""
        return [Path(model.name).name for model in self.models]

    def with_head(self, head: str) -> Model:
        """The first model with that head.

        Raises:
            MissingHeadError: there is none; the message says how to get one.
        """
        found = next((model for model in self.models if head in model.heads), None)
        if found is None:
            raise MissingHeadError(
                f"this needs a checkpoint with the head {head!r}, and {', '.join(self.names)} has none. "
                f"Start the demo with one more --checkpoint: {_HOW[head]}"
            )
        return found

    def search(self, text: str, k: int) -> list[Hit]:
        """The k files of the folder that fit a text best; a file that has vanished since is left out."""
        if self.index is None:
            raise ValueError(NO_FOLDER)
        model = self.with_head("contrastive")
        feature = model.encode_texts(text)[0]
        hits: list[Hit] = []
        for found in self.index.query(feature, int(np.clip(k, 1, MOST_ANSWERS))):
            try:
                hits.append(Hit(self.picture_of(found.path, _THUMBNAIL), found.path, found.similarity))
            except (ValueError, OSError):
                warnings.warn(f"{found.path} cannot be read any more: build the index again", stacklevel=2)
        return hits

    def examples(self, count: int) -> list[Hit]:
        """The first few images of the folder that can be read."""
        found: list[Hit] = []
        for name in self.index.items if self.index is not None else ():
            if len(found) == count:
                break
            if Path(name).suffix.lower() in IMAGE_ENDINGS:
                with contextlib.suppress(ValueError, OSError):
                    found.append(Hit(self.picture_of(name, _THUMBNAIL), name, 1.0))
        return found

    def picture_of(self, name: str, side: int = _LARGEST_SHOWN) -> Image.Image:
        """A file of the folder, by its name in the index, as a picture of at most `side` pixels; of a clip the middle.

        Raises:
            ValueError: the index holds no such file, or it cannot be read; OSError: it is gone.
        """
        if self.index is None or name not in self.index.items:
            raise ValueError(f"{name} is not in the folder that is searched")
        path = Path(self.index.manifest["folder"]) / name
        if path.suffix.lower() in VIDEO_ENDINGS:
            picture = clip_frames(path, 3)[1]
        else:
            picture = images.load_rgb(images.open_image(path.read_bytes()), (side, side))
        return picture if max(picture.size) <= side else _fitted(picture, side)

    def look(self, file: str | None, text: str) -> Sight:
        """Score and attention of a text to an uploaded picture."""
        data, name = self._picture(file)
        able = [model for head in ("matching", "contrastive") for model in self.models if head in model.heads]
        model = (able or list(self.models))[0]
        attention = _named(name, lambda: model.attention_map(data, text))
        picture = images.load_rgb(images.open_image(data))
        base = np.asarray(_fitted(picture, _MAP_SIDE))
        maps = [(ALL, attention.overall), *word_maps(attention)]
        sizes = (base.shape[1], base.shape[0])
        return Sight(
            match=float(model.match(data, text)) if "matching" in model.heads else None,
            similarity=float(model.similarity(data, text)[0, 0]) if "contrastive" in model.heads else None,
            maps=[
                (Image.fromarray(overlay(base, values[0], pixels=_MAP_SIDE)).resize(sizes), word)
                for word, values in maps
            ],
        )

    def answer(self, file: str | None, question: str, k: int = 5) -> list[tuple[str, float]]:
        """The k likeliest answers to a question about an uploaded picture, with their probabilities."""
        model = self.with_head("vqa")
        data, name = self._picture(file)
        return _named(name, lambda: model.answer(data, question, k))

    def fill(self, file: str | None, text: str, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each `<mask>` of a text about an uploaded picture: the k likeliest tokens, with their probabilities."""
        model = self.with_head("masked_language")
        data, name = self._picture(file)
        return _named(name, lambda: model.fill_mask(text, data, k))

    def _picture(self, file: str | None) -> tuple[bytes, str]:
        """The bytes of an uploaded picture and its name.

        Raises:
            MediaError: there is none, or it is too large a file, or no picture.
        """
        if not file:
            raise MediaError("choose a picture first")
        path = Path(file)
        try:
            size = path.stat().st_size
            if size > self.largest_upload * 2**20:
                raise MediaError(
                    f"{path.name} has {size / 2**20:.1f} MiB, and at most {self.largest_upload:g} are taken: "
                    "make the picture smaller"
                )
            data = path.read_bytes()
        except OSError as error:
            raise MediaError(f"{path.name} has not arrived: choose it once more") from error
        try:
            images.open_image(data)
        except ValueError as error:
            raise MediaError(f"{path.name}: {error}. {_KINDS}") from error
        return data, path.name


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at `side` pixels, however narrow it is."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)


def _named(name: str, call: Callable[[], Result]) -> Result:
    """Calls; what is wrong with the picture is said with the user's name of it."""
    try:
        return call()
    except (TextError, MissingHeadError):
        raise
    except MediaError as error:
        raise MediaError(f"{name}: {str(error).partition(': ')[2]}") from error
    except ValueError as error:
        raise MediaError(f"{name}: {error}") from error
