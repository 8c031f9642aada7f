"""Facts about video decoding. The mean brightness of frame k of a test clip is 16 + 8·k (modulo 192)."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from scl_jax.data import video
from scl_jax.data.builders.raw_files import pack_frames


def clip(
    total: int = 24,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    key_every: int = 6,
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
    noise: int = 0,
) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    with av.open(buffer, "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", key_every
        stream.codec_context.time_base = Fraction(1, 8)
        for k in range(total):
            picture = (16 + 8 * k % 192 + rng.integers(-noise, noise + 1, (48, 64, 3))).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = times[k] if times else k
            frame.time_base = Fraction(1, 8)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def numbers(decoded: np.ndarray) -> list[int]:
    """The frame numbers back from the brightness."""
    return np.round((decoded.mean(axis=(1, 2, 3)) - 16) / 8).astype(int).tolist()


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("mp4", "libx265"),
        ("mp4", "libsvtav1"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("avi", "libx264"),
        ("mpegts", "libx264"),
    ],
)
def test_evaluation_takes_evenly_spaced_frames_from_first_to_last(container, codec):
    decoded = video.decode_frames(clip(container=container, codec=codec), 4)
    assert decoded.shape == (4, 48, 64, 3) and decoded.dtype == np.uint8
    assert numbers(decoded) == [0, 8, 15, 23]


def test_training_takes_one_frame_of_each_interval():
    data = clip()
    seen = set()
    for seed in range(12):
        chosen = numbers(video.decode_frames(data, 4, rng=np.random.default_rng(seed)))
        assert [number // 6 for number in chosen] == [0, 1, 2, 3]
        seen.update(chosen)
    assert len(seen) > 12


def test_frames_are_chosen_over_the_whole_of_every_interval():
    low, high = np.zeros(4), np.full(4, 0.999_999)
    assert video.choose_frames(20, 4, low).tolist() == [0, 5, 10, 15]
    assert video.choose_frames(20, 4, high).tolist() == [4, 9, 14, 19]


def test_every_frame_is_found_when_all_are_wanted():
    assert numbers(video.decode_frames(clip(), 24)) == list(range(24))
    assert numbers(video.decode_frames(clip(), 24, rng=np.random.default_rng(0))) == list(range(24))


def test_a_short_clip_repeats_frames_in_order():
    assert numbers(video.decode_frames(clip(3), 8)) == [0, 0, 1, 1, 1, 1, 2, 2]
    assert numbers(video.decode_frames(clip(1), 4)) == [0, 0, 0, 0]
    assert numbers(video.decode_frames(clip(2), 4, rng=np.random.default_rng(0))) == [0, 0, 1, 1]


def test_one_frame_is_the_first_at_evaluation():
    assert numbers(video.decode_frames(clip(), 1)) == [0]


def test_variable_frame_rate():
    times = np.cumsum([0, 1, 1, 7, 1, 1, 30, 1, 1, 1, 2, 5]).tolist()
    assert numbers(video.decode_frames(clip(12, times=times), 4)) == [0, 4, 7, 11]


def test_fragmented_file_without_index():
    data = clip(options={"movflags": "frag_keyframe+empty_moov+default_base_moof"})
    assert numbers(video.decode_frames(data, 4)) == [0, 8, 15, 23]


def test_a_stream_without_times_is_decoded_from_the_start():
    assert numbers(video.decode_frames(clip(container="h264"), 4)) == [0, 8, 15, 23]


def test_only_the_groups_of_the_wanted_frames_are_decoded(monkeypatch):
    decoded, real = [], video._decode_sparingly

    def watching(*args):
        for frame in real(*args):
            decoded.append(round(8 * frame.time))
            yield frame

    monkeypatch.setattr(video, "_decode_sparingly", watching)
    assert numbers(video.decode_frames(clip(24, key_every=6), 3)) == [0, 12, 23]
    assert {0, 12, 23} <= set(decoded) <= {0, 12, *range(18, 24)}


def test_a_frame_is_the_same_however_it_was_reached():
    data = clip(24, key_every=24, noise=16)
    every = video.decode_frames(data, 24)
    for seed in range(5):
        draws = np.random.default_rng(seed).random(4)
        some = video.decode_frames(data, 4, rng=np.random.default_rng(seed))
        np.testing.assert_array_equal(some, every[video.choose_frames(24, 4, draws)])
        np.testing.assert_array_equal(some, video._decode_from_start(data, 4, draws))


def test_the_converter_of_a_thread_gives_what_a_new_one_gives():
    rng = np.random.default_rng(0)
    sizes = [(48, 64), (50, 66), (1080, 1920), (48, 64)]
    formats = ["yuv420p", "yuvj420p", "yuv444p", "nv12", "yuv420p10le", "gray", "rgb24"]
    for height, width in sizes:
        rgb = av.VideoFrame.from_ndarray(rng.integers(0, 256, (height, width, 3), np.uint8), format="rgb24")
        for name in formats + formats[:1]:
            frame = rgb.reformat(format=name)
            np.testing.assert_array_equal(video._to_rgb(frame), frame.to_ndarray(format="rgb24"))


def displayed(data: bytes, *matrix: int) -> bytes:
    """An mp4 clip with another display matrix ((a, b), (c, d)) in its track header, where a point of column p and row q
    goes to column a·p + c·q and row b·p + d·q."""

    def written(a: int, b: int, c: int, d: int) -> bytes:
        values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        return b"".join((value % 2**32).to_bytes(4, "big") for value in values)

    identity = written(1, 0, 0, 1)
    start = data.index(identity, data.index(b"tkhd"))
    return data[:start] + written(*matrix) + data[start + len(identity) :]


@pytest.mark.parametrize(
    ("matrix", "seen"),
    [
        ((0, 1, -1, 0), lambda clip: np.rot90(clip, -1, axes=(1, 2))),
        ((0, -1, 1, 0), lambda clip: np.rot90(clip, 1, axes=(1, 2))),
        ((-1, 0, 0, -1), lambda clip: clip[:, ::-1, ::-1]),
        ((-1, 0, 0, 1), lambda clip: clip[:, :, ::-1]),
        ((1, 0, 0, -1), lambda clip: clip[:, ::-1]),
        ((0, 1, 1, 0), lambda clip: clip.transpose(0, 2, 1, 3)),
        ((0, -1, -1, 0), lambda clip: clip[:, ::-1, ::-1].transpose(0, 2, 1, 3)),
    ],
)
def test_a_clip_is_turned_and_mirrored_as_its_camera_says(matrix, seen):
    data = clip(2, noise=16)
    np.testing.assert_array_equal(video.decode_frames(displayed(data, *matrix), 2), seen(video.decode_frames(data, 2)))


def test_frames_that_hold_the_exif_of_a_camera_are_turned_upright(tmp_path):
    """PyAV has no name for these data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for k in range(2):
        Image.new("RGB", (64, 48), (16 + 8 * k,) * 3).save(tmp_path / f"{k}.jpg", exif=exif)
    decoded = video.decode_frames(pack_frames(tmp_path), 2)
    assert decoded.shape == (2, 64, 48, 3) and numbers(decoded) == [0, 1]


def test_a_broken_tail_is_cut_off():
    data = clip(24, container="matroska", key_every=4, noise=16)
    decoded = numbers(video.decode_frames(data[: int(len(data) * 0.6)], 4))
    assert decoded[0] == 0 and decoded == sorted(decoded) and 4 <= decoded[-1] < 23


def test_damage_in_the_middle_leaves_the_readable_part():
    data = bytearray(clip(24, container="mpegts", key_every=4))
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    assert video.decode_frames(bytes(data), 4).shape == (4, 48, 64, 3)


def test_audio_only_is_an_error_that_says_so():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(ValueError, match=r"no video stream \(it holds: audio\)"):
        video.decode_frames(buffer.getvalue(), 4)


def test_a_stream_of_zero_frames_is_an_error():
    with pytest.raises(ValueError, match="no frame that can be decoded|cannot decode video"):
        video.decode_frames(clip(0), 4)


def test_a_file_that_lost_its_index_is_an_error():
    data = clip(24, container="mp4")  # the index of an mp4 file stands at its end
    with pytest.raises(ValueError, match=r"cannot decode video of \d+ bytes: Invalid data"):
        video.decode_frames(data[: data.index(b"moov") - 4], 4)


def test_an_avi_file_without_its_index_still_decodes():
    data = clip(24, container="avi", codec="mpeg4")
    assert numbers(video.decode_frames(data[: data.index(b"idx1")], 4)) == [0, 8, 15, 23]


@pytest.mark.parametrize("side", [20_000, 65_535])
def test_a_clip_of_enormous_frames_is_refused_by_its_header(side):
    """The decoder finds the size in the stream itself, which the container's header need not tell."""
    data = clip(4, container="webm", codec="libvpx")
    start = data.index(b"\x9d\x01\x2a") + 3  # of a VP8 key frame; width and height follow
    frames = data.replace(data[: start + 4][-7:], b"\x9d\x01\x2a" + min(side, 16_383).to_bytes(2, "little") * 2)
    with pytest.raises(ValueError, match="pixels a frame|no frame that can be decoded|cannot decode video"):
        video.decode_frames(frames, 2)


def test_where_the_size_changes_within_a_clip_later_frames_are_scaled():
    small, large = clip(4, container="h264"), _larger(4)
    decoded = video.decode_frames(small + large, 8)
    assert decoded.shape == (8, 48, 64, 3)
    assert numbers(decoded) == [0, 1, 2, 3, 0, 1, 2, 3]


def _larger(total: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="h264") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for k in range(total):
            out.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((96, 128, 3), 16 + 8 * k, np.uint8), format="rgb24"))
            )
        out.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"\x00" * 1000])
def test_no_video_at_all_is_an_error(data):
    with pytest.raises(ValueError, match="cannot decode video"):
        video.decode_frames(data, 4)


def test_damaged_bytes_give_frames_or_a_value_error():
    rng = np.random.default_rng(0)
    whole = [clip(8, container=container, noise=8) for container in ("mp4", "matroska", "avi", "mpegts")]
    outcomes = set()
    for i in range(300):
        data = bytearray(whole[i % 4])
        data[rng.integers(len(data))] = rng.integers(256)
        data[rng.integers(2000) % len(data)] = rng.integers(256)
        try:
            outcomes.add(video.decode_frames(bytes(data), 4).shape[0])
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {4, "refused"}


def test_a_mov_of_an_older_camera_is_a_clip():
    """It has no box that names its kind: it begins with an empty one, or at once with frames or their index."""
    data = clip(8, container="mov")
    assert data[4:8] == b"ftyp"
    for first in (b"wide", b"free", b"skip"):
        older = data[:4] + first + data[8:]
        assert video.is_video(older) and numbers(video.decode_frames(older, 2)) == [0, 7]
    for start in (b"moov", b"mdat"):
        assert video.is_video(data[data.index(start) - 4 :])


def test_containers_are_told_from_images():
    assert video.is_video(clip(1)) and video.is_video(clip(1, container="matroska"))
    assert not video.is_video(b"\xff\xd8\xff\xe0") and not video.is_video(b"\x00\x00\x00\x1cftypavif")
