"""What users hand in as an image or a clip → pixels as the model was trained on them.

An image is a path, the bytes of a file, a PIL image, or a uint8 array (H, W, 3) or (H, W); of an animated one the first
frame counts. A clip is the path or the bytes of a video file or of an animated image, or a uint8 array (F, H, W, 3).
Axes: F frames, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from scl_jax.data import images, video

Media = str | os.PathLike | bytes | Image.Image | np.ndarray
LARGEST_FILE = 2**30  # bytes; a larger clip should be cut first
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ogv", ".flv", ".wmv")


class MediaError(ValueError):
    """Something that cannot be used as an image or a clip; the message says which, why, and what to do."""


def as_list(media: Media | Sequence[Media]) -> tuple[list[Media], bool]:
    """A list of media, and whether it was a single one. An array is always one image or clip."""
    if not isinstance(media, list | tuple):
        return [cast(Media, media)], True
    if not media:
        raise MediaError("an empty list of images or clips")
    return list(media), False


def is_clip(media: Media) -> bool:
    """Whether it is shown to the model as several frames: a video file or an array of four axes."""
    if isinstance(media, np.ndarray):
        return media.ndim == 4
    if isinstance(media, str | os.PathLike):
        with open(_existing(media), "rb") as file:
            return video.is_video(file.read(16))
    return isinstance(media, bytes) and video.is_video(media[:16])


def image_pixels(media: Media, size: int) -> UInt8[np.ndarray, "1 size size 3"]:
    """One image, resized to the square as in evaluation.

    Raises:
        MediaError: no image, a broken or far too large one, or a clip.
    """
    try:
        if isinstance(media, np.ndarray) and media.ndim == 4:
            raise ValueError(f"an array of shape {media.shape} is a clip: use it where clips are taken")
        if isinstance(media, np.ndarray):
            image = _array_image(media)
        elif isinstance(media, Image.Image):
            image = images.load_rgb(_checked(media))
        else:
            data = _read(media)
            if video.is_video(data):
                raise ValueError("a video, not an image: use it where clips are taken, such as encode_videos")
            image = images.load_rgb(images.open_image(data))
        return images.resize_square(image, size)[None]
    except (ValueError, OSError) as error:
        raise MediaError(f"{describe(media)}: {error}") from error


def clip_pixels(media: Media, frames: int, size: int) -> UInt8[np.ndarray, "F size size 3"]:
    """`clip_frames` as the model sees them, each resized to the square."""
    return np.stack([images.resize_square(picture, size) for picture in clip_frames(media, frames)])


def clip_frames(media: Media, frames: int) -> list[Image.Image]:
    """`frames` evenly spaced frames of a clip; a shorter clip repeats some.

    Raises:
        MediaError: no clip, or one that cannot be read.
    """
    try:
        if isinstance(media, np.ndarray):
            if media.ndim != 4 or len(media) == 0:
                raise ValueError(f"an array of shape {media.shape} is no clip: (F, H, W, 3) is expected")
            return [_array_image(media[i]) for i in video.choose_frames(len(media), frames, None)]
        if isinstance(media, Image.Image):
            return _animation(media, frames)
        data = _read(media)
        if video.is_video(data):
            return [Image.fromarray(frame) for frame in video.decode_frames(data, frames)]
        return _animation(images.open_image(data), frames)
    except (ValueError, OSError, EOFError) as error:
        raise MediaError(f"{describe(media)}: {error}") from error


def load_pixels(
    media: Sequence[Media], frames: int | None, size: int, threads: int = 4
) -> UInt8[np.ndarray, "B F S S 3"]:
    """Images, or clips of `frames` frames each, as one array, decoded by a few threads.

    Args:
        frames: None for images; a model may also see a single frame of each clip.

    Raises:
        MediaError: about the first that cannot be used.
    """

    def load(one: Media) -> np.ndarray:
        return image_pixels(one, size) if frames is None else clip_pixels(one, frames, size)

    if len(media) == 1:
        return load(media[0])[None]
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(load, media)))


def describe(media: Media) -> str:
    """What to call it in a message."""
    if isinstance(media, str | os.PathLike):
        return str(media)
    if isinstance(media, bytes):
        return f"{len(media)} bytes"
    if isinstance(media, Image.Image):
        return str(getattr(media, "filename", "") or f"a PIL image of {media.width}x{media.height} pixels")
    if isinstance(media, np.ndarray):
        return f"an array of shape {media.shape}"
    return f"a {type(media).__name__}"


def _existing(media: str | os.PathLike) -> Path:
    path = Path(os.path.expanduser(media))  # which leaves "~tmp.png" alone where there is no such user
    if path.is_dir():
        raise MediaError(f"{path}: a folder; name files in it, {path / '*'} in a shell")
    if not path.is_file():
        is_text = " " in str(media) and not path.suffix  # "a red star" stands where a picture is expected
        raise MediaError(f"{path}: no such file{' (media first, then text)' if is_text else ''}")
    if path.stat().st_size > LARGEST_FILE:
        raise MediaError(f"{path}: {path.stat().st_size / 2**30:.1f} GiB; cut it to below {LARGEST_FILE / 2**30:.0f}")
    return path


def _read(media: Media) -> bytes:
    if isinstance(media, bytes):
        return media
    if isinstance(media, str | os.PathLike):
        return _existing(media).read_bytes()
    raise ValueError("give a path, bytes, a PIL image or a uint8 array")


def _checked(image: Image.Image) -> Image.Image:
    """A copy, for decoding may put a draft of smaller size in place of the original."""
    if image.width * image.height > images.MAX_PIXELS:
        raise ValueError(f"more than {images.MAX_PIXELS} pixels; make it smaller first")
    if min(image.size) < 1:
        raise ValueError("it has no pixels")
    try:
        return image.copy()
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(f"cannot decode {image.format or 'image'}: {error}") from error


def _array_image(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or 0 in array.shape:
        raise ValueError(f"an array of {array.dtype}, shape {array.shape}; uint8 (H, W, 3) or (H, W) is expected")
    if array.shape[0] * array.shape[1] > images.MAX_PIXELS:
        raise ValueError(f"more than {images.MAX_PIXELS} pixels; make it smaller first")
    return Image.fromarray(array).convert("RGB")


def _animation(image: Image.Image, frames: int) -> list[Image.Image]:
    try:
        total = getattr(image, "n_frames", 1)
    except Exception as error:  # it looks for the end, through whatever a broken file holds
        raise ValueError(f"cannot decode {image.format or 'image'}: {error}") from error
    if total < 2:
        raise ValueError("an image, not a clip: use it where images are taken, such as encode_images")
    pictures = {}
    for index in sorted(set(video.choose_frames(total, frames, None).tolist())):
        try:
            image.seek(index)
        except Exception as error:
            raise ValueError(f"cannot decode frame {index} of {total}: {error}") from error
        pictures[index] = images.load_rgb(_checked(image))
    return [pictures[index] for index in video.choose_frames(total, frames, None).tolist()]
