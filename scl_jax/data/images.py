"""Image files to pixels, and the random and fixed transforms of pixels.

Everything here ends in raw sRGB bytes, uint8 (size, size, 3); normalisation is done on the device.
Random transforms are first *drawn* (`draw_augmentation`) and then *applied* (`augment`), because
- a JPEG larger than its crop needs is decoded at 1/2, 1/4 or 1/8 scale: the crop must be known before the pixels;
- every frame of a clip gets the same crop, flip and operations.
Training offers two resizes (`data.<stream>.resize`): "bicubic", the paper's, by Pillow, and "fast" (`augment_fast`), an
area filter that costs less and gives slightly other pixels. Evaluation is always bicubic.

Axes: H W pixels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from scl_jax.data.rand_augment import Operation, draw_operations

MAX_PIXELS = 89_478_485  # Pillow's own warning limit: 256 MiB as RGB; a larger file is taken for a decompression bomb
# formats that Pillow decodes by itself; EPS is left out because it would start Ghostscript on a stranger's file, ICO
# because it is decoded when it is opened, before its size can be looked at
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
_JPEG = ("JPEG", "MPO")  # MPO: several JPEGs in one file, as phones write them; the first counts
_STRAY = re.compile(r"(\d+) extraneous bytes before marker")
_MOST_STRAY_BYTES = 16  # some cameras and programs pad; more come from a decoder that lost its way in damaged data
_UPRIGHT = {  # what undoes an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange width and height
_SIDED = re.compile(r"\b(left|right)(-?hand(ed)?|most|wards?)?\b|\b(counter-?|anti-?)?clockwise\b", re.IGNORECASE)
_CROP_ATTEMPTS = 10

cv2.setNumThreads(1)  # the pipeline is parallel over examples


def names_side(caption: str) -> bool:
    """Whether mirroring the picture could make the caption wrong: it says left or right, or a sense of rotation."""
    return _SIDED.search(caption) is not None


# ---- files to pixels ----


class UnknownFormatError(ValueError):
    """The bytes do not begin as an image of a known format does."""


def open_image(data: bytes) -> Image.Image:
    """Reads the header of an encoded image; the pixels stay encoded until `load_rgb`.

    Raises:
        ValueError: no image, an unknown format (UnknownFormatError), or more than MAX_PIXELS pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"image has far more than {MAX_PIXELS} pixels (a decompression bomb?)") from error
    except Image.UnidentifiedImageError as error:
        reason = "empty file" if not data else f"no image format known here, {len(data)} bytes, first {data[:8]!r}"
        raise UnknownFormatError(f"cannot decode image: {reason}") from error
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(f"cannot decode image: broken header ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image of {image.width}x{image.height} has more than {MAX_PIXELS} pixels")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image once its EXIF orientation is applied."""
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def load_rgb(image: Image.Image, at_least: tuple[float, float] | None = None) -> Image.Image:
    """Decodes what `open_image` opened (its first frame) to upright RGB.

    `at_least` (width, height of the upright image): a JPEG may be decoded at the smallest of the scales 1, 1/2, 1/4,
    1/8 that is no smaller than this, which is faster and properly filtered. None: full size.
    Grey, palette and CMYK become RGB, 16-bit loses its low byte, transparency is laid over white.

    Raises:
        ValueError: truncated or corrupt data, or pixels of a kind that has no defined brightness (floats).
    """
    pixels = _load(image, at_least)
    return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels


def load_pixels(image: Image.Image, at_least: tuple[float, float] | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """`load_rgb` as an array, the same bytes; the usual upright RGB JPEG is an array in the first place."""
    return np.asarray(_load(image, at_least))


def _load(image: Image.Image, at_least: tuple[float, float] | None) -> Image.Image | np.ndarray:
    orientation = _orientation(image)
    try:
        if (data := _encoded_jpeg(image)) is not None:
            scale = _jpeg_scale(image.size, reversed(at_least) if at_least and orientation >= 5 else at_least)
            colours = {"RGB": "RGB", "L": "GRAY"}.get(image.mode, "CMYK")
            pixels = _decode_jpeg(data, scale, colours)
            if colours == "RGB" and orientation == 1:
                return pixels
            if colours == "CMYK":  # inverted or not, as Pillow knows
                image.draft("CMYK", (max(image.width // scale, 1), max(image.height // scale, 1)))
            else:
                image = Image.fromarray(pixels if colours == "RGB" else pixels[..., 0])
        image.load()
        return _to_rgb(image.transpose(_UPRIGHT[orientation]) if orientation != 1 else image)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(f"cannot decode {image.format or 'image'}: {error}") from error


def _encoded_jpeg(image: Image.Image) -> bytes | None:
    """The file of an image as `open_image` leaves it, if it is a JPEG of the size that was looked at."""
    untouched = image.format in _JPEG and getattr(image, "tile", None) and image.tell() == 0
    file = getattr(image, "fp", None)
    if not untouched or not isinstance(file, io.BytesIO):
        return None
    data = file.getvalue()
    height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)  # `_decode_jpeg` is strict
    return data if (int(width), int(height)) == image.size else None


def _jpeg_scale(size: tuple[int, int], at_least: Iterable[float] | None) -> int:
    """The largest n of 1, 2, 4, 8 such that 1/n of the size is enough."""
    if at_least is None:
        return 1
    enough = min(side // math.ceil(wanted) for side, wanted in zip(size, at_least, strict=True))
    return next(n for n in (8, 4, 2, 1) if n <= max(enough, 1))


def _decode_jpeg(data: bytes, scale: int, colours: str) -> UInt8[np.ndarray, "H W _"]:
    """libjpeg-turbo at 1/scale: the same bytes as Pillow's, which keeps silent where data are damaged or missing."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    least = {"min_width": -(-int(width) // scale), "min_height": -(-int(height) // scale)}
    decode = partial(simplejpeg.decode_jpeg, colorspace=colours, **least, min_factor=scale)
    try:
        return decode(data, strict=True)
    except ValueError as error:
        if (mended := _mended_header(data, colours)) != data:
            return _decode_jpeg(mended, scale, colours)
        stray = _STRAY.search(str(error))
        if stray is None or int(stray[1]) > _MOST_STRAY_BYTES:
            raise
        return decode(data, strict=False)


def _mended_header(data: bytes, colours: str) -> bytes:
    """The same JPEG with the usual values in fields that decoders warn of, though they say nothing of the pixels.

    Instead of letting these warnings pass, because a strict decoder stops at the first and would miss damage behind it:
    the coefficients that a sequential scan names (some Samsung phones write 0 to 0; it always holds 0 to 63), a version
    of JFIF other than 1, an unknown transform of Adobe's.
    """
    mended, place, sequential = bytearray(data), 2, False
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, body = data[place + 1], place + 4
        end = place + 2 + int.from_bytes(data[place + 2 : body])
        if marker == 0xFF:  # fills
            place += 1
            continue
        if end < body or end > len(data):
            break
        if marker in (0xC0, 0xC1):
            sequential = True
        elif marker == 0xE0 and data[body : body + 5] == b"JFIF\0" and end - body >= 14:
            mended[body + 5] = 1
        elif marker == 0xEE and data[body : body + 5] == b"Adobe" and end - body >= 12 and data[body + 11] > 2:
            mended[body + 11] = 2 if colours == "CMYK" else 1  # what decoders assume
        elif marker == 0xDA:
            if sequential and end - body >= 6:
                mended[end - 3 : end] = bytes((0, 63, 0))
            break
        place = end
    return bytes(mended)


def decode_image(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image file (first frame of an animated one) to upright sRGB bytes.

    Raises:
        ValueError: with the reason when the data is no image, truncated, corrupt or too large.
    """
    return np.array(_load(open_image(data), None))


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow tells its upright size and turns it as it decodes
        return 1
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not make the picture unreadable
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined brightness; store 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if "A" in image.mode.upper().replace("LAB", "") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- transforms ----


@dataclass(frozen=True)
class Augmentation:
    """What was drawn for one example, the same for each of its frames.

    `box` (left, top, right, bottom) is in fractions of width and height, so it holds at any decoding scale.
    """

    box: tuple[float, float, float, float]
    flip: bool
    operations: tuple[Operation, ...]
    size: int

    def sufficient_size(self) -> tuple[float, float]:
        """(width, height) of the whole picture at which the crop still has `size` pixels each way."""
        left, top, right, bottom = self.box
        return self.size / (right - left), self.size / (bottom - top)


def draw_crop(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws a crop of a share `scale` of the area and of ratio 3/4 to 4/3: torchvision's RandomResizedCrop rule.

    Returns (left, top, right, bottom) in pixels. After ten misses: the centred largest crop of allowed ratio. Where the
    least share is 1, nothing may be cut off: the whole picture, whatever its ratio.
    """
    if scale[0] >= 1:
        return 0, 0, width, height
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(1, round(height * 4 / 3)))
    crop_height = min(height, max(1, round(width / (3 / 4))))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def draw_augmentation(
    image_size: tuple[int, int],
    size: int,
    crop_scale: tuple[float, float],
    flip: str,
    rand_augment: tuple[int, int],
    caption: str,
    rng: np.random.Generator,
) -> Augmentation:
    """Draws crop, flip and RandAugment operations for an example of `image_size` (width, height) and its caption.

    flip: "never", "always" (half of the time, whatever the caption says) or "unless_sided" (half of the time, but
    not when the caption names a side). rand_augment: (operations, magnitude 0 to 30), (0, 0) for none.
    """
    if flip not in ("never", "unless_sided", "always"):
        raise ValueError(f"flip is {flip!r}; choose never, unless_sided or always")
    width, height = image_size
    left, top, right, bottom = draw_crop(width, height, crop_scale, rng)
    mirrored = bool(rng.random() < 0.5)  # drawn in every case, so that a policy does not shift the other draws
    allowed = flip == "always" or (flip == "unless_sided" and not names_side(caption))
    return Augmentation(
        box=(left / width, top / height, right / width, bottom / height),
        flip=mirrored and allowed,
        operations=draw_operations(*rand_augment, rng),
        size=size,
    )


def augment(image: Image.Image, drawn: Augmentation) -> UInt8[np.ndarray, "size size 3"]:
    """Applies a drawn augmentation to an RGB image: crop and bicubic resize (antialiased), flip, operations."""
    width, height = image.size
    left, top, right, bottom = drawn.box
    box = (left * width, top * height, min(right * width, width), min(bottom * height, height))
    image = image.resize((drawn.size, drawn.size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    if drawn.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _operate(image, drawn.operations)


def augment_fast(pixels: UInt8[np.ndarray, "H W 3"], drawn: Augmentation) -> UInt8[np.ndarray, "size size 3"]:
    """`augment` with a cheaper resize: a crop in whole pixels, interpolated, then averaged in blocks.

    Bilinear interpolation brings the crop to the nearest multiple of `size`, at least the double, where steps are
    too short (1.25 pixels at most) to skip anything; a pixel of the result is the mean of one block.
    """
    height, width, _ = pixels.shape
    left, top, right, bottom = drawn.box
    crop = pixels[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
    if crop.shape[:2] != (drawn.size, drawn.size):
        rows, columns = (drawn.size * max(2, round(side / drawn.size)) for side in crop.shape[:2])
        crop = cv2.resize(crop, (columns, rows), interpolation=cv2.INTER_LINEAR)
        crop = cv2.resize(crop, (drawn.size, drawn.size), interpolation=cv2.INTER_AREA)
    if drawn.flip:
        crop = cv2.flip(crop, 1)
    return _operate(Image.fromarray(crop), drawn.operations) if drawn.operations else np.ascontiguousarray(crop)


def _operate(image: Image.Image, operations: tuple[Operation, ...]) -> UInt8[np.ndarray, "size size 3"]:
    for operation in operations:
        image = operation(image)
    return np.array(image)


def resize_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The evaluation transform: the whole RGB image resized to the square, bicubic and antialiased."""
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC))
