"""`input`: images and clips a second on one core, by stage; made-up media of the usual sizes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import av
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from scl_jax.data import images, video

MEDIA = 16  # different files, so that caches hold no more of them than in training
JPEG_SIZE, JPEG_QUALITY = (640, 480), 85
CLIP_SIZE, CLIP_FRAMES, CLIP_RATE = (640, 360), 150, 25


def measure(data: ConfigDict, seconds: float) -> dict[str, Any]:
    """Items a second of every stage and of whole examples, for each resize, on the calling thread's processor time.

    `data` is `config.data`. `seconds` are spent on each stage. Images are 640×480 JPEGs, clips 640×360 H.264 of 6 s.
    """
    results = {f"images/{name}": rate for name, rate in _image_rates(data.images, seconds).items()}
    return results | {f"clips/{name}": rate for name, rate in _clip_rates(data.videos, seconds).items()}


def _rate(make: Callable[[int], Any], seconds: float) -> float:
    """Calls a second of processor time, the best of three thirds: other work on the machine slows caches and clock."""
    make(0)
    best, count = 0.0, 0
    for _ in range(3):
        start, done = time.thread_time(), 0
        while (spent := time.thread_time() - start) < seconds / 3:
            make(count)
            count, done = count + 1, done + 1
        best = max(best, done / spent)
    return best


def _draw(size: tuple[int, int], stream: ConfigDict, index: int) -> images.Augmentation:
    rng = np.random.default_rng(index)
    crop, operations = tuple(stream.crop_scale), tuple(stream.rand_augment)
    return images.draw_augmentation(size, stream.image_size, crop, stream.flip, operations, "a photograph", rng)


def _image_rates(stream: ConfigDict, seconds: float) -> dict[str, float]:
    files = [_jpeg(index) for index in range(MEDIA)]
    decoded = [images.load_rgb(images.open_image(data)) for data in files]
    arrays = [np.asarray(image) for image in decoded]

    def bicubic(i: int) -> np.ndarray:
        opened = images.open_image(files[i % MEDIA])
        drawn = _draw(images.upright_size(opened), stream, i)
        return images.augment(images.load_rgb(opened, drawn.sufficient_size()), drawn)

    def fast(i: int) -> np.ndarray:
        data = files[i % MEDIA]
        opened = images.open_image(data)
        drawn = _draw(images.upright_size(opened), stream, i)
        return images.augment_fast(images.load_pixels(opened, drawn.sufficient_size()), drawn)

    def pixels(i: int) -> np.ndarray:
        data = files[i % MEDIA]
        return images.load_pixels(images.open_image(data), JPEG_SIZE)

    stages: dict[str, Callable[[int], Any]] = {
        "decode (Pillow)": lambda i: Image.open(io.BytesIO(files[i % MEDIA])).convert("RGB"),
        "decode (libjpeg-turbo)": pixels,
        "draw": lambda i: _draw(JPEG_SIZE, stream, i),
        "crop, bicubic": lambda i: images.augment(decoded[i % MEDIA], _draw(JPEG_SIZE, stream, i)),
        "crop, fast": lambda i: images.augment_fast(arrays[i % MEDIA], _draw(JPEG_SIZE, stream, i)),
        "evaluation square": lambda i: images.resize_square(decoded[i % MEDIA], stream.image_size),
        "example, bicubic": bicubic,
        "example, fast": fast,
    }
    return {name: _rate(make, seconds) for name, make in stages.items()}


def _clip_rates(stream: ConfigDict, seconds: float) -> dict[str, float]:
    files = [_clip(index) for index in range(2)]
    frames = video.decode_frames(files[0], stream.frames)

    def decode(i: int) -> np.ndarray:
        return video.decode_frames(files[i % len(files)], stream.frames, rng=np.random.default_rng(i))

    def bicubic(clip: np.ndarray, i: int) -> np.ndarray:
        drawn = _draw(CLIP_SIZE, stream, i)
        return np.stack([images.augment(Image.fromarray(frame), drawn) for frame in clip])

    def fast(clip: np.ndarray, i: int) -> np.ndarray:
        drawn = _draw(CLIP_SIZE, stream, i)
        return np.stack([images.augment_fast(frame, drawn) for frame in clip])

    stages: dict[str, Callable[[int], Any]] = {
        "decode": decode,
        "crop, bicubic": lambda i: bicubic(frames, i),
        "crop, fast": lambda i: fast(frames, i),
        "example, bicubic": lambda i: bicubic(decode(i), i),
        "example, fast": lambda i: fast(decode(i), i),
    }
    return {name: _rate(make, seconds) for name, make in stages.items()}


def _picture(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth colours with grain: an entropy, and so a decoding time, like a photograph's."""
    width, height = size
    coarse = Image.fromarray(rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
    grain = rng.normal(0, 8, (height, width, 1))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_picture(JPEG_SIZE, np.random.default_rng(seed))).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _clip(seed: int) -> bytes:
    """A picture that moves by a pixel a frame; a key frame each second."""
    picture, buffer = _picture(CLIP_SIZE, np.random.default_rng(seed)), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream: Any = out.add_stream("libx264", rate=CLIP_RATE)
        stream.width, stream.height = CLIP_SIZE
        stream.pix_fmt, stream.gop_size, stream.options = "yuv420p", CLIP_RATE, {"preset": "veryfast"}
        for frame in range(CLIP_FRAMES):
            moved = np.ascontiguousarray(np.roll(picture, frame, axis=1))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()
