"""Examples of the alignment scores: the authors' files, your own, and the toy world's own boxes.

<folder>/images/<name>.jpg
<folder>/pkls/<name>.pkl    {"caption": str, "annotation": {phrase: [{"bbox_mask": [x0, y0, x1, y1],
                             "pixel_mask": truth values (height, width)}, …]}}
<folder>/images/<name>.json {"caption": str, "annotation": {phrase: [[x0, y0, x1, y1], …]}}; read where there is no .pkl
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scl_jax.data import images
from scl_jax.data.builders import open_source, toy_world
from scl_jax.data.video import choose_frames
from scl_jax.evaluation.alignment.plain_pickle import PickleError, read_pickle
from scl_jax.evaluation.alignment.scores import Example, Phrase, Region

_ENDINGS = (".jpg", ".jpeg", ".png")


def align_bench(folder: Path | str, max_items: int = 0) -> Iterator[Example]:
    """The examples of a folder in the order of their names; `max_items` of them, 0 for all.

    Raises:
        FileNotFoundError: the folder has no annotations, or an image is missing.
        ValueError: an annotation is broken, of another form, or would run code; the message names the file.
    """
    folder = Path(folder)
    found = [*(folder / "pkls").glob("*.pkl")] or [*(folder / "images").glob("*.json")]
    files = sorted(found, key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise FileNotFoundError(
            f"{folder}/pkls holds no .pkl file and {folder}/images no .json: give the folder that holds images/, "
            "as docs/data.md describes it"
        )
    for file in files[: max_items or None]:
        media = next((p for end in _ENDINGS if (p := folder / "images" / f"{file.stem}{end}").exists()), None)
        if media is None:
            raise FileNotFoundError(f"{folder}/images/{file.stem}.jpg is missing, the image of {file.name}")
        yield _example(file, media)


def _example(file: Path, media: Path) -> Example:
    data = media.read_bytes()
    width, height = images.upright_size(images.open_image(data))
    content, wrong = (read_pickle(file), PickleError) if file.suffix == ".pkl" else (_read_json(file), ValueError)
    try:
        caption, annotation = content["caption"], content["annotation"]
        if not isinstance(caption, str) or not isinstance(annotation, Mapping):
            raise ValueError("caption is no text or annotation is no dictionary")
        region = _region if file.suffix == ".pkl" else _box
        phrases = [
            Phrase(text, find_phrase(text, caption), tuple(region(one, height, width) for one in regions))
            for text, regions in annotation.items()
        ]
    except (KeyError, TypeError, IndexError) as error:
        raise wrong(f"{file}: not an annotation of ALIGN-BENCH ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise wrong(f"{file}: {error}") from error
    return Example(file.stem, data, caption, tuple(phrases))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON: {error}") from error


def _region(region: Mapping[str, Any], height: int, width: int) -> Region:
    box = np.trunc(np.asarray(region["bbox_mask"], np.float64)).astype(np.int64).reshape(1, 4)
    mask = np.asarray(region["pixel_mask"])
    if mask.shape[-2:] != (height, width) or mask.size != height * width:
        raise ValueError(f"a mask of shape {mask.shape}, but the image has {width}x{height} pixels (upright)")
    return Region(box, mask.reshape(1, height, width) > 0)


def _box(corners: Any, height: int, width: int) -> Region:
    """A region that is known by its box only: the mask is the filled box."""
    problem = f"box {str(corners)[:60]} is not x0, y0, x1, y1 in pixels of an image of {width}x{height}"
    try:
        box = np.trunc(np.asarray(corners, np.float64))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(problem) from error
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(problem)
    x0, y0, x1, y1 = box = box.clip(0, (width, height, width, height)).astype(np.int64)
    if x0 >= x1 or y0 >= y1:
        raise ValueError(problem)
    region = Region(box[None], np.zeros((1, height, width), bool))
    return Region(region.boxes, region.filled())


def find_phrase(phrase: str, caption: str) -> tuple[int, int] | None:
    """Where a phrase stands first in a caption as whole words, whatever its capitals and spaces; None: nowhere."""
    words = [re.escape(word) for word in phrase.split()]
    found = re.search(r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)", caption, re.IGNORECASE) if words else None
    return found.span() if found else None


def toy_examples(name: str, split: str, data_dir: Path | str, frames: int = 1, max_items: int = 0) -> Iterator[Example]:
    """Scenes of "toy_world/images" or "toy_world/videos" with their first caption and its phrases.

    Args:
        frames: of a clip that the model sees, evenly spaced.
        max_items: that many, from the first on; 0 for all.
    """
    source = open_source(name, split, data_dir)
    for index in range(min(max_items, len(source)) if max_items else len(source)):
        record = source[index]
        phrases = []
        for phrase in toy_world.phrases(record):
            if phrase.caption == 0:
                seen = choose_frames(len(phrase.boxes), frames, None)
                region = Region(phrase.boxes[seen], phrase.masks[seen])
                phrases.append(Phrase(phrase.text, (phrase.start, phrase.end), (region,)))
        yield Example(record["id"], record["media"], record["captions"][0], tuple(phrases))
