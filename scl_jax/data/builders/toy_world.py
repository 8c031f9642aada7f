"""The toy world: small scenes of coloured shapes, still ("toy_world/images") and moving ("toy_world/videos").

The embedded default, on which every task runs and learns within minutes. A record is a function of (seed, split,
index) alone and is the same for any number of records. Training scenes never show the colour-shape pairs of
`toy_scenes.HELD_OUT`; every validation and test scene does, and there no scene contains all colour-shape pairs of
another one, so that a caption identifies its scene.

Downstream tasks have configs of their own: "questions" with answers, "statements" about two scenes, and "entailment"
of hypotheses about one; see toy_tasks.py.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import av
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from scl_jax.data.builders import bytes_feature, record_features, toy_captions, toy_scenes, toy_tasks
from scl_jax.data.builders.targets import (
    ENTAILMENT_CLASSES,
    STATEMENT_CLASSES,
    label_features,
    label_targets,
    question_features,
    question_targets,
    with_keys,
)
from scl_jax.data.vqa_answers import ANSWERS_PER_QUESTION

FRAMES_PER_SECOND = 8
_MAX_ATTEMPTS = 1000  # at one evaluation scene unlike those before it


@dataclass
class ToyWorldConfig(tfds.core.BuilderConfig):
    """How many records a split has, and the seed of them all."""

    train: int = 20_000  # every config has its own default
    validation: int = 200
    test: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Phrase:
    """A noun phrase of a caption and the object it names, frame by frame."""

    text: str
    caption: int  # which caption of the record
    start: int  # first character in that caption
    end: int  # the character after the last
    thing: int  # which object of the scene
    boxes: Int[np.ndarray, "F 4"]  # x0, y0, x1, y1 in pixels, x1 and y1 just outside
    masks: Bool[np.ndarray, "F H W"]


def _scene_features() -> tfds.features.FeaturesDict:
    return record_features(
        things=tfds.features.Tensor(shape=(None, 3), dtype=np.int32),  # indices of colour, shape and size
        boxes=tfds.features.Tensor(shape=(None, 4), dtype=np.int32),  # frames · objects of them
        phrases=tfds.features.Tensor(shape=(None, 4), dtype=np.int32),  # caption, start, end, object
        masks=bytes_feature(),  # PNG of (frames · height, width): 0 background, k + 1 object k
    )


@dataclass(frozen=True)
class _Kind:
    """What a config's records are."""

    train: int  # records, unless said otherwise
    features: Callable[[], tfds.features.FeaturesDict]
    classes: tuple[str, ...] = ()


_KINDS = {
    "images": _Kind(20_000, _scene_features),
    "videos": _Kind(4_000, _scene_features),
    "questions": _Kind(10_000, question_features, toy_tasks.ANSWERS),
    "statements": _Kind(20_000, lambda: label_features(two_images=True), STATEMENT_CLASSES),
    "entailment": _Kind(10_000, label_features, ENTAILMENT_CLASSES),
}


class ToyWorld(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of all configs."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "Objects of stills lie on a grid.", "1.0.0": "Objects lie anywhere."}

    def _info(self) -> tfds.core.DatasetInfo:
        kind = _KINDS[cast(ToyWorldConfig, self.builder_config).name]
        return tfds.core.DatasetInfo(
            builder=self,
            features=kind.features(),
            metadata=tfds.core.MetadataDict(classes=list(kind.classes)),
            description=__doc__ or "",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = cast(ToyWorldConfig, self.builder_config)
        sizes = {"train": config.train, "validation": config.validation, "test": config.test}
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = cast(ToyWorldConfig, self.builder_config)
        return with_keys(records(config.name, split, size, config.seed), self.info.metadata, split)


def make_builder(
    config_name: str,
    data_dir: str,
    *,
    train: int | None = None,
    validation: int = 200,
    test: int = 200,
    seed: int = 0,
) -> ToyWorld:
    """The builder of a config of _KINDS, with its number of training records unless `train` is given."""
    if config_name not in _KINDS:
        raise ValueError(f"toy_world has the configs {', '.join(map(repr, _KINDS))}, not {config_name!r}")
    train = _KINDS[config_name].train if train is None else train
    for option, value in {"train": train, "validation": validation, "test": test}.items():
        if value < 1:
            raise ValueError(f"toy_world/{config_name}: {option}={value}; a split needs at least one record")
    config = ToyWorldConfig(name=config_name, train=train, validation=validation, test=test, seed=seed)
    return ToyWorld(config=config, data_dir=data_dir)


def records(config_name: str, split: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """The records of a split in order, as they are written; those of a smaller split come first in a larger one."""
    if config_name not in ("images", "videos"):
        for index in range(size):
            yield _TASKS[config_name](_generator(config_name, split, index, seed), split, index)
        return
    evaluation = split != "train"
    draw = toy_scenes.draw_things if config_name == "images" else toy_scenes.draw_moving_things
    before: list[frozenset] = []
    for index in range(size):
        rng = _generator(config_name, split, index, seed)
        for _ in range(_MAX_ATTEMPTS):
            things = draw(rng, held_out=evaluation)
            pairs = frozenset((thing.colour, thing.shape) for thing in things)
            if not evaluation or not any(pairs <= other or other <= pairs for other in before):
                break
        else:
            raise ValueError(f"toy_world/{config_name}: cannot tell {size} scenes of {split} apart; ask for fewer")
        if evaluation:
            before.append(pairs)
        scene = toy_scenes.place(rng, things, frames=1 if config_name == "images" else int(rng.integers(8, 17)))
        yield _record(f"{split}_{index:06d}", scene, rng, captions=int(rng.integers(2, 4)) if evaluation else 3)


def phrases(record: dict[str, Any]) -> list[Phrase]:
    """The noun phrases of a record of `open_source("toy_world/…")`, with their boxes and masks."""
    count = len(record["things"])
    boxes = record["boxes"].reshape(-1, count, 4)  # (F·K, 4) → (F, K, 4)
    labels = np.asarray(Image.open(io.BytesIO(record["masks"])))
    labels = labels.reshape(len(boxes), -1, labels.shape[1])  # (F·H, W) → (F, H, W)
    return [
        Phrase(record["captions"][caption][start:end], caption, start, end, k, boxes[:, k], labels == k + 1)
        for caption, start, end, k in record["phrases"].tolist()
    ]


def _record(name: str, scene: toy_scenes.Scene, rng: np.random.Generator, captions: int) -> dict[str, Any]:
    frames, labels = toy_scenes.render(scene, rng)
    written = toy_captions.captions(scene, rng, captions)
    colours = list(toy_scenes.COLOURS)
    return {
        "id": name,
        "media": encode_clip(frames) if len(frames) > 1 else encode_image(frames[0]),
        "captions": [caption.text for caption in written],
        "things": np.asarray(
            [
                (colours.index(t.colour), toy_scenes.SHAPES.index(t.shape), toy_scenes.SIZES.index(t.size))
                for t in scene.things
            ],
            np.int32,
        ),
        "boxes": toy_scenes.boxes(scene).reshape(-1, 4),
        "phrases": np.asarray([(i, *p) for i, caption in enumerate(written) for p in caption.phrases], np.int32),
        "masks": _png(labels.reshape(-1, labels.shape[2])),
    }


def _generator(config_name: str, split: str, index: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(f"{config_name}/{split}".encode()), index])


# ---- downstream tasks ----


def _questions(rng: np.random.Generator, split: str, index: int) -> dict[str, Any]:
    scene = toy_scenes.place(rng, toy_scenes.draw_things(rng, split != "train"), frames=1)
    asked = toy_tasks.draw_questions(rng, scene, split != "train")
    return {
        "id": f"{split}_{index:06d}",
        "media": _drawn(scene, rng),
        "captions": [one.text for one in asked],
        **question_targets(
            [str(10 * index + number) for number in range(len(asked))],
            [{toy_tasks.ANSWERS.index(one.answer): 1.0} for one in asked],
            [one.answer for one in asked for _ in range(ANSWERS_PER_QUESTION)],
        ),
    }


def _statement(rng: np.random.Generator, split: str, index: int) -> dict[str, Any]:
    text, *sides = toy_tasks.draw_statement(rng, kind=index // 2, true=index % 2 == 1, evaluation=split != "train")
    left, right = (_drawn(toy_scenes.place(rng, things, frames=1), rng) for things in sides)
    name = f"{split}_{index:06d}"
    return {
        "id": name,
        "media": left,
        "second_media": right,
        "captions": [text],
        **label_targets([name], [index % 2]),
    }


def _entailment(rng: np.random.Generator, split: str, index: int) -> dict[str, Any]:
    pixels, hypotheses = toy_tasks.draw_entailment(rng, evaluation=split != "train")
    name = f"{split}_{index:06d}"
    return {
        "id": name,
        "media": encode_image(pixels),
        "captions": [text for text, _ in hypotheses],
        **label_targets([f"{name}-{number}" for number in range(len(hypotheses))], [label for _, label in hypotheses]),
    }


_TASKS = {"questions": _questions, "statements": _statement, "entailment": _entailment}


# ---- files ----


def _drawn(scene: toy_scenes.Scene, rng: np.random.Generator) -> bytes:
    return encode_image(toy_scenes.render(scene, rng)[0][0])


def encode_image(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """JPEG at quality 95 with full colour resolution: decodes two to three times as fast as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def encode_clip(frames: UInt8[np.ndarray, "F H W 3"]) -> bytes:
    """H.264 in mp4 with full colour resolution and a key frame every four frames, which makes seeking cheap."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.options = {
            "preset": "ultrafast",
            "tune": "fastdecode,zerolatency",
            "crf": "14",
            "g": "4",
            "aq-mode": "0",
        }
        stream.codec_context.thread_count = 1  # the same bytes whatever the number of cores
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _png(labels: UInt8[np.ndarray, "H W"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG", compress_level=1)
    return file.getvalue()
