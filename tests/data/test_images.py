"""Facts about image decoding and the transforms."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from scl_jax.data import images
from scl_jax.data.rand_augment import MAX_MAGNITUDE, OPERATIONS, Operation, draw_operations


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats_give_back_the_pixels(form):
    image = Image.new("RGB", (7, 5), (200, 100, 50))
    np.testing.assert_array_equal(images.decode_image(encode(image, form)), np.asarray(image))


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats_come_close(form):
    decoded = images.decode_image(encode(gradient(), form, quality=95))
    assert decoded.shape == (30, 40, 3) and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - np.asarray(gradient())).mean() < 4


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, form):
    upright = gradient()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, form, quality=95, exif=exif)
    decoded = images.decode_image(data)
    assert decoded.shape == (30, 40, 3)
    assert np.abs(decoded.astype(int) - np.asarray(upright)).mean() < 4
    assert images.upright_size(images.open_image(data)) == (40, 30)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_lose_the_picture():
    data = encode(gradient(), "JPEG", exif=b"Exif\x00\x00II*\x00garbage")
    assert images.decode_image(data).shape == (30, 40, 3)


def test_grey_and_black_and_white_become_rgb():
    assert (images.decode_image(encode(Image.new("L", (4, 4), 77))) == 77).all()
    assert (images.decode_image(encode(Image.new("1", (4, 4), 1))) == 255).all()


def test_cmyk_becomes_rgb():
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = images.decode_image(data)[4, 4].tolist()
    assert red > 240 and green < 15 and blue < 15


def test_sixteen_bit_grey_is_scaled_not_clipped():
    data = encode(Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16)))
    assert images.decode_image(data)[0, :, 0].tolist() == [0, 0x12, 0xFF]


def test_transparency_is_laid_over_white():
    assert (images.decode_image(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == 255).all()
    assert images.decode_image(encode(Image.new("LA", (4, 4), (0, 128))))[0, 0].tolist() == [127] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert images.decode_image(encode(palette))[0, 0].tolist() == [10, 20, 30]
    assert (images.decode_image(encode(palette, transparency=1)) == 255).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form):
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 250))
    data = encode(first, form, save_all=True, append_images=[second])
    red, _, blue = images.decode_image(data)[4, 4].tolist()
    assert red > 200 and blue < 50


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_an_error(form):
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), form)
    with pytest.raises(ValueError, match="cannot decode"):
        images.decode_image(data[: len(data) // 2])


def ends_early(data: bytes) -> bytes:
    middle = len(data) * 2 // 3
    return data[:middle] + b"\xff\xd9" + bytes(len(data) - middle - 2)


def loses_its_way(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(200) + data[middle + 200 :]


@pytest.mark.parametrize("damage", [ends_early, loses_its_way])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("at_least", [None, (50.0, 40.0)], ids=["whole", "scaled"])
def test_a_jpeg_damaged_within_is_an_error(damage, mode, at_least):
    """Pillow would return it with a grey or garbled rest."""
    whole = encode(photograph().convert(mode), "JPEG", quality=90)
    images.load_rgb(images.open_image(whole), at_least)
    with pytest.raises(ValueError, match="cannot decode JPEG: Corrupt JPEG data"):
        images.load_rgb(images.open_image(damage(whole)), at_least)


def test_a_little_padding_in_a_jpeg_is_no_damage():
    data = encode(photograph(), "JPEG")
    padded = data[:-2] + bytes(8) + data[-2:]
    np.testing.assert_array_equal(images.decode_image(padded), images.decode_image(data))


def with_zero_spectrum(data: bytes) -> bytes:
    """As some Samsung phones write the header of a scan: coefficients 0 to 0 instead of 0 to 63."""
    scan = data.index(b"\xff\xda")
    end = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4])
    return data[: end - 3] + bytes(3) + data[end:]


def of_jfif_2(data: bytes) -> bytes:
    version = data.index(b"JFIF\0") + 5
    return data[:version] + b"\x02" + data[version + 1 :]


def with_unknown_transform(data: bytes) -> bytes:
    """Adobe's marker in place of JFIF's."""
    length = int.from_bytes(data[4:6])
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + b"\x07" + data[4 + length :]


@pytest.mark.parametrize("odd", [with_zero_spectrum, of_jfif_2, with_unknown_transform])
def test_an_odd_header_of_a_jpeg_is_no_damage_but_damage_behind_it_is(odd):
    data = encode(photograph(), "JPEG", quality=90)
    np.testing.assert_array_equal(images.decode_image(odd(data)), images.decode_image(data))
    for damaged in (data[: len(data) // 2], loses_its_way(data)):
        with pytest.raises(ValueError, match="cannot decode JPEG: (Corrupt JPEG data|Premature end)"):
            images.decode_image(odd(damaged))


def test_several_jpegs_in_one_file_give_the_first():
    data = encode(photograph(), "MPO", save_all=True, append_images=[gradient()], quality=90)
    assert images.open_image(data).format == "MPO"
    np.testing.assert_array_equal(
        images.decode_image(data), images.decode_image(encode(photograph(), "JPEG", quality=90))
    )


def test_no_image_at_all_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="empty file"):
        images.decode_image(b"")
    with pytest.raises(ValueError, match="no image format known"):
        images.decode_image(b"<html>not found</html>")


def test_postscript_is_never_interpreted():
    with pytest.raises(ValueError, match="no image format known"):
        images.decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def test_icons_are_not_decoded():
    """Opening one decodes the file within, whatever its size."""
    with pytest.raises(ValueError, match="no image format known"):
        images.decode_image(encode(Image.new("RGB", (16, 16)), "ICO", sizes=[(16, 16)]))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_600, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    data = encode(Image.new("RGB", (8, 8)))
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + data[24:29]
    with pytest.raises(ValueError, match="pixels"):
        images.decode_image(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])


def test_reduced_decoding_is_no_smaller_than_asked_for():
    data = encode(gradient(640, 480), "JPEG")
    for wanted, expected in [((320, 240), (320, 240)), ((321, 240), (640, 480)), ((50, 50), (80, 60))]:
        assert images.load_rgb(images.open_image(data), wanted).size == expected
    assert images.load_rgb(images.open_image(data)).size == (640, 480)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = images.open_image(encode(gradient(640, 480), "JPEG", exif=exif))
    assert images.load_rgb(turned, (240, 320)).size == (240, 320)  # of the upright picture


def test_what_suffices_for_a_crop_is_the_whole_picture_at_which_it_is_large_enough():
    assert images.Augmentation((0.25, 0, 0.75, 0.25), False, (), 16).sufficient_size() == (32, 64)


def test_reduced_decoding_changes_the_crop_only_slightly():
    data = encode(gradient(800, 600), "JPEG", quality=95)
    drawn = images.Augmentation(box=(0.1, 0.2, 0.8, 0.9), flip=False, operations=(), size=64)
    small = images.load_rgb(images.open_image(data), drawn.sufficient_size())
    assert small.size == (100, 75) or small.size == (200, 150)
    full = images.load_rgb(images.open_image(data))
    difference = images.augment(small, drawn).astype(int) - images.augment(full, drawn)
    assert np.abs(difference).mean() < 2


def test_crops_keep_to_area_ratio_and_picture():
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = images.draw_crop(200, 150, (0.5, 0.8), rng)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 150
        width, height = right - left, bottom - top
        assert 0.49 < width * height / (200 * 150) < 0.81
        assert 0.74 < width / height < 1.35


def test_crops_lie_anywhere_and_are_as_often_wide_as_high():
    """Up to every edge; the logarithm of the ratio is drawn evenly, as torchvision does it."""
    rng = np.random.default_rng(0)
    left, top, right, bottom = np.array([images.draw_crop(40, 40, (0.5, 0.8), rng) for _ in range(1000)]).T
    assert left.min() == top.min() == 0 and right.max() == bottom.max() == 40
    left, top, right, bottom = np.array([images.draw_crop(900, 900, (0.1, 0.3), rng) for _ in range(4000)]).T
    assert abs(np.log((right - left) / (bottom - top)).mean()) < 0.008


def test_the_box_is_the_crop_in_fractions_of_either_side():
    left, top, right, bottom = images.draw_crop(40, 30, (0.8, 1.0), np.random.default_rng(0))
    assert draw().box == (left / 40, top / 30, right / 40, bottom / 30)


def test_a_picture_too_narrow_for_the_ratio_gets_the_largest_centred_crop():
    rng = np.random.default_rng(0)
    assert images.draw_crop(1000, 30, (0.8, 1.0), rng) == (480, 0, 520, 30)
    assert images.draw_crop(30, 1000, (0.8, 1.0), rng) == (0, 480, 30, 520)
    assert images.draw_crop(1, 1, (0.8, 1.0), rng) == (0, 0, 1, 1)


@pytest.mark.parametrize("size", [(400, 100), (30, 1000), (640, 480), (640, 360)])
def test_the_whole_area_is_the_whole_picture_whatever_its_ratio(size):
    for seed in range(20):
        assert images.draw_crop(*size, (1.0, 1.0), np.random.default_rng(seed)) == (0, 0, *size)


@pytest.mark.parametrize(
    ("caption", "sided"),
    [
        ("a dog on the LEFT of a cat", True),
        ("the right-hand lane", True),
        ("the leftmost star", True),
        ("it moves leftwards", True),
        ("the wheel turns clockwise", True),
        ("a bright leftover pizza", False),
        ("the copyright of a wright", False),
    ],
)
def test_captions_that_name_a_side(caption, sided):
    assert images.names_side(caption) is sided


def draw(flip="always", caption="a cat", rand_augment=(0, 0), seed=0):
    rng = np.random.default_rng(seed)
    return images.draw_augmentation((40, 30), 16, (0.8, 1.0), flip, rand_augment, caption, rng)


def test_flip_policies():
    flips = {
        (flip, caption): np.mean([draw(flip, caption, seed=seed).flip for seed in range(1000)])
        for flip in ("never", "unless_sided", "always")
        for caption in ("a cat", "a cat on the left")
    }
    half = pytest.approx(0.5, abs=0.05)
    assert flips["never", "a cat"] == 0 and flips["unless_sided", "a cat on the left"] == 0
    assert flips["unless_sided", "a cat"] == half and flips["always", "a cat on the left"] == half
    with pytest.raises(ValueError, match="choose never, unless_sided or always"):
        draw("sometimes")


def test_the_flip_policy_does_not_shift_other_draws():
    assert draw("never").box == draw("always").box
    assert draw("never", rand_augment=(2, 9)).operations == draw("always", rand_augment=(2, 9)).operations


def test_augmentation_is_a_pure_function_of_the_generator():
    for seed in range(20):
        first, again = (images.augment(gradient(), draw(rand_augment=(2, 9), seed=seed)) for _ in range(2))
        assert first.shape == (16, 16, 3) and first.dtype == np.uint8
        np.testing.assert_array_equal(first, again)


def test_a_flip_mirrors_the_crop():
    drawn = images.Augmentation((0, 0, 1, 1), False, (), 16)
    mirrored = images.Augmentation((0, 0, 1, 1), True, (), 16)
    np.testing.assert_array_equal(images.augment(gradient(), drawn), images.augment(gradient(), mirrored)[:, ::-1])


def photograph(width: int = 200, height: int = 150) -> Image.Image:
    """Smooth patches with texture."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 8, (height, width, 1)), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("box", [(0.1, 0.2, 0.8, 0.9), (0, 0, 1, 1), (0.4, 0.4, 0.5, 0.5)], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_the_fast_resize_gives_nearly_the_bicubic_pixels(box, flip):
    image, drawn = photograph(), images.Augmentation(box, flip, (), 64)
    fast = images.augment_fast(np.asarray(image), drawn)
    assert fast.shape == (64, 64, 3) and fast.dtype == np.uint8
    assert np.abs(fast.astype(int) - images.augment(image, drawn)).mean() < 3


@pytest.mark.parametrize("scale", [1.5, 2, 3.5, 7])
def test_the_fast_resize_does_not_alias(scale):
    """A checkerboard finer than the output's pixels becomes grey; nearest or bilinear sampling leaves a pattern."""
    side = round(64 * scale)
    board = ((np.add.outer(np.arange(side), np.arange(side)) % 2) * 255).astype(np.uint8)
    whole = images.Augmentation((0, 0, 1, 1), False, (), 64)
    assert images.augment_fast(np.repeat(board[..., None], 3, axis=2), whole).std() < 10 < board[:64, :64].std()


def test_fast_operations_are_those_of_the_bicubic_path():
    image = photograph(64, 64)
    drawn = images.Augmentation((0, 0, 1, 1), True, draw_operations(2, 9, np.random.default_rng(3)), 64)
    np.testing.assert_array_equal(images.augment_fast(np.asarray(image), drawn), images.augment(image, drawn))


@pytest.mark.parametrize("at_least", [(100.0, 75.0), (180.0, 150.0), (40.0, 30.0), (999.0, 999.0)], ids=str)
@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "progressive", "turned", "PNG", "4:4:4"])
def test_pixels_are_the_same_bytes_whichever_decoder_reads_them(kind, at_least):
    image, options = photograph(), {"quality": 90}
    if kind in ("L", "CMYK"):
        image = image.convert(kind)
    if kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    options |= {"progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}}.get(kind, {})
    data = encode(image, "PNG") if kind == "PNG" else encode(image, "JPEG", **options)
    pixels = images.load_pixels(images.open_image(data), at_least)
    np.testing.assert_array_equal(pixels, np.asarray(images.load_rgb(images.open_image(data), at_least)))
    if kind != "turned":  # Pillow's own way
        opened = Image.open(io.BytesIO(data))
        opened.draft(opened.mode, tuple(map(int, at_least)))
        np.testing.assert_array_equal(pixels, np.asarray(opened.convert("RGB")))


def test_evaluation_resizes_the_whole_picture():
    square = images.resize_square(gradient(), 20)
    assert square.shape == (20, 20, 3)
    assert square[:, 0, 0].max() < 12 and square[:, -1, 0].min() > 243


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.25, 0.2, 0.75, 0.8)], ids=["whole", "a crop"])
def test_the_resize_is_pillows_bicubic_of_the_crop(box):
    """In training and, of the whole, in evaluation (METHOD section 6)."""
    image = photograph()
    pixels = [round(share * side) for share, side in zip(box, image.size * 2, strict=True)]
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC, box=pixels))
    np.testing.assert_array_equal(images.augment(image, images.Augmentation(box, False, (), 64)), expected)
    if box == (0, 0, 1, 1):
        np.testing.assert_array_equal(images.resize_square(image, 64), expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_grows_with_its_severity(name):
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    image = Image.blend(gradient(128, 128), Image.fromarray(noise), 0.1)
    changes = []
    for severity in (0.0, 0.3, 1.0):
        changed = Operation(name, severity)(image)
        assert changed.size == image.size and changed.mode == "RGB"
        changes.append(np.abs(np.asarray(changed).astype(int) - np.asarray(image)).mean())
    if name not in ("auto_contrast", "equalize"):  # these have no severity
        assert changes[0] < 0.5 and changes[1] <= changes[2] and changes[2] > 0


def test_shear_and_shift_move_along_their_own_axis():
    """What is the same all along it stays as it is, but for what comes in from outside."""
    rows = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[:, None], 60, axis=1)
    stripes = {"x": Image.fromarray(np.stack([rows] * 3, axis=2)), "y": Image.fromarray(np.stack([rows.T] * 3, axis=2))}
    for name in ("shear_x", "translate_x", "shear_y", "translate_y"):
        for axis, image in stripes.items():
            middle = np.s_[25:35, 25:35]
            same = (np.asarray(Operation(name, 0.5)(image))[middle] == np.asarray(image)[middle]).all()
            assert same == name.endswith(axis), (name, axis)


def test_operations_are_drawn_with_both_signs_from_the_whole_list():
    drawn = draw_operations(2000, 9, np.random.default_rng(0))
    assert {operation.name for operation in drawn} == set(OPERATIONS)
    assert {operation.severity for operation in drawn} == {0.3, -0.3}
    assert draw_operations(0, 0, np.random.default_rng(0)) == ()
    with pytest.raises(ValueError, match="magnitude 0 to 30"):
        draw_operations(2, MAX_MAGNITUDE + 1, np.random.default_rng(0))
