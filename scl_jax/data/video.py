"""Video files to a few frames, decoding as little of the clip as these frames need.

The packets are first listed without decoding (cheap: the file is in memory), which gives the true number and times of
the frames whatever the container says, also for variable frame rates and files without an index. For each chosen frame
the decoder then starts at the last key frame before it, or just runs on when it is already past that key frame.
Where this cannot work (packets without times, a seek that fails, a frame that does not decode) the clip is decoded from
its beginning, and frames are chosen among those that can be read: a broken tail is cut off, it does not spoil the clip.
So a clip that could be decoded once, with whatever frames, can always be decoded.

Axes: F frames, H W pixels.
"""

from __future__ import annotations

import io
import threading
from bisect import bisect_right
from collections.abc import Iterator

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8
from PIL import Image

from scl_jax.data.images import MAX_PIXELS

_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # images in an mp4-like box
_QUICKTIME = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # first in a mov without "ftyp", an older one
_CONTAINERS = (b"\x1aE\xdf\xa3", b"OggS", b"FLV", b"0&\xb2u")


def decode_frames(data: bytes, frames: int, *, rng: np.random.Generator | None = None) -> UInt8[np.ndarray, "F H W 3"]:
    """Decodes `frames` frames of a video file, in order of time, upright, as sRGB bytes.

    With `rng` (training) one random frame out of each of F equal intervals of the clip, without (evaluation) evenly
    spaced ones from the first to the last; intervals count frames. A clip of fewer frames repeats some.

    Raises:
        ValueError: no readable video file, no video stream, not one frame that decodes, or too large a picture.
    """
    draws = None if rng is None else rng.random(frames)
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            stream = _video_stream(container)
            try:
                return _decode_by_seek(container, stream, frames, draws)
            except (_SeekError, FFmpegError):
                pass
        return _decode_from_start(data, frames, draws)
    except FFmpegError as error:
        raise ValueError(f"cannot decode video of {len(data)} bytes: {error.strerror or error}") from error


def is_video(data: bytes) -> bool:
    """Whether the first bytes are those of a usual video container (mp4/mov, Matroska/WebM, AVI, Ogg, FLV, ASF)."""
    if data[4:8] == b"ftyp":
        return data[8:12] not in _STILL_BRANDS
    if data[4:8] in _QUICKTIME:
        return True
    return data.startswith(_CONTAINERS) or (data.startswith(b"RIFF") and data[8:12] == b"AVI ")


def choose_frames(total: int, frames: int, draws: np.ndarray | None) -> Int[np.ndarray, " F"]:
    """Indices of `frames` out of `total` frames, ascending; `draws` (F,) in [0, 1) places one in each interval."""
    if draws is None:
        return np.round(np.linspace(0, total - 1, frames)).astype(np.int64)
    return np.minimum(((np.arange(frames) + draws) * total / frames).astype(np.int64), total - 1)


class _SeekError(Exception):
    """Some chosen frame cannot be reached by its time; decode from the start."""


def _video_stream(container: InputContainer) -> av.VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise ValueError(f"file has no video stream (it holds: {', '.join(kinds)})")
    stream = streams[0]
    if stream.codec_context is None:
        raise ValueError("cannot decode video: no decoder for its codec is installed here")
    if stream.width * stream.height > MAX_PIXELS:
        raise ValueError(f"video of {stream.width}x{stream.height} has more than {MAX_PIXELS} pixels a frame")
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # of frames, whose size is not that of the header
    stream.codec_context.thread_count = 1  # the pipeline is parallel over examples
    stream.codec_context.open()  # before any frame is skipped: some decoders (dav1d) fix what they skip when opened
    return stream


def _decode_by_seek(
    container: InputContainer, stream: av.VideoStream, frames: int, draws: np.ndarray | None
) -> np.ndarray:
    times, key_times = _list_packets(container, stream)
    targets = [times[i] for i in choose_frames(len(times), frames, draws)]
    pictures: dict[int, np.ndarray] = {}
    decoder: Iterator[av.VideoFrame] = iter(())
    position: int | None = None  # time of the frame decoded last
    for target in dict.fromkeys(targets):
        key_time = key_times[max(0, bisect_right(key_times, target) - 1)]
        if position is None or key_time > position:
            container.seek(key_time, stream=stream, backward=True)
            decoder = _decode_sparingly(container, stream, set(targets))
        for frame in decoder:
            if frame.pts is None or frame.pts > target or frame.is_corrupt:
                raise _SeekError
            position = frame.pts
            if position == target:
                pictures[target] = _to_rgb(frame)
                break
        else:
            raise _SeekError
    return _stack([pictures[target] for target in targets])


def _decode_sparingly(container: InputContainer, stream: av.VideoStream, wanted: set[int]) -> Iterator[av.VideoFrame]:
    """The frames from here on without those that are neither wanted nor needed to decode another (a third faster)."""
    for packet in container.demux(stream):
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from packet.decode()


def _list_packets(container: InputContainer, stream: av.VideoStream) -> tuple[list[int], list[int]]:
    """Presentation times of all frames and of the key frames, ascending, in units of the stream's time base."""
    times, key_times = [], []
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:  # the flush packet at the end; frames cut off by an edit list
                continue
            if packet.pts is None or packet.is_corrupt:
                raise _SeekError
            times.append(packet.pts)
            if packet.is_keyframe:
                key_times.append(packet.pts)
    except FFmpegError as error:
        raise _SeekError from error
    if not times or not key_times or len(set(times)) < len(times):
        raise _SeekError
    if stream.codec_context.has_b_frames and times == sorted(times):
        raise _SeekError  # the codec reorders frames, so ascending times are those of decoding (AVI knows no others)
    return sorted(times), sorted(key_times)


def _decode_from_start(data: bytes, frames: int, draws: np.ndarray | None) -> np.ndarray:
    # two passes, so that only the chosen frames are ever held in memory
    total = sum(1 for _ in _readable_frames(data))
    if total == 0:
        raise ValueError("video stream holds no frame that can be decoded")
    targets = choose_frames(total, frames, draws).tolist()
    pictures = {i: _to_rgb(frame) for i, frame in enumerate(_readable_frames(data)) if i in targets}
    return _stack([pictures[target] for target in targets])


def _readable_frames(data: bytes) -> Iterator[av.VideoFrame]:
    """The frames from the first on, up to the end or to the first error."""
    with av.open(io.BytesIO(data), mode="r") as container:
        try:
            for frame in container.decode(_video_stream(container)):
                if frame.is_corrupt:
                    return
                yield frame
        except FFmpegError:
            return


class _Converters(threading.local):
    """The converter of each thread, which keeps its tables while size and format of frames stay the same.

    Left to itself, every frame makes one, which costs as much as converting 500 × 300 pixels.
    """

    def __init__(self) -> None:
        self.to_rgb = VideoReformatter()


_CONVERTERS = _Converters()


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    picture = _CONVERTERS.to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
    turns = frame.rotation // 90  # counter-clockwise, as rot90 counts
    if _is_mirrored(frame):  # of a clip that is mirrored alone, the angle says half a turn
        picture, turns = picture[:, ::-1], turns + 2
    return np.rot90(picture, turns)


def _is_mirrored(frame: av.VideoFrame) -> bool:
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV gives nothing where one of the data is of a kind that it has no name for, such as EXIF
        return False
    if matrix is None:
        return False
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    return a * d < b * c


def _stack(pictures: list[np.ndarray]) -> np.ndarray:
    """The pictures as one array; where the size changes within a clip, later ones are scaled as a player does."""
    height, width, _ = pictures[0].shape
    alike = [
        picture if picture.shape == pictures[0].shape else np.asarray(Image.fromarray(picture).resize((width, height)))
        for picture in pictures
    ]
    return np.stack(alike)
