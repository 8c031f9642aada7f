"""Whatever is handed in, a message says what was wrong; nothing else breaks."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_model import PRETRAINING, gif, png, png_header, scenes, write_run

import scl_jax
from scl_jax.inference import MediaError, MissingHeadError, TextError
from scl_jax.inference.__main__ import main

CLIP = scenes("videos", 1)[0]["media"]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"", "empty file"),
        (b"no picture at all", "no image format known here"),
        (png()[:60], "cannot decode"),
        (CLIP, "a video, not an image"),
        (png_header(20_000, 20_000), "far more than 89478485 pixels"),
        (png_header(10_000, 10_000), "10000x10000 has more than 89478485 pixels"),
        ("missing.jpg", "no such file"),
        (np.zeros((8, 8, 3)), "uint8"),
        (np.zeros((0, 8, 3), np.uint8), "uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), "is a clip"),
        (3, "give a path, bytes, a PIL image or a uint8 array"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_name(tiny_model, picture, message):
    with pytest.raises(MediaError, match=message):
        tiny_model.encode_images(picture)


def test_a_folder_is_called_a_folder(tiny_model, tmp_path):
    with pytest.raises(MediaError, match="a folder; name files in it"):
        tiny_model.match(tmp_path, "a red star")


@pytest.mark.parametrize("given", [5, None, b"a red star"])
def test_what_is_no_text_is_refused(tiny_model, given):
    with pytest.raises(TextError, match=f"a text or a list of texts is expected, not a {type(given).__name__}"):
        tiny_model.encode_texts(given)


def test_swapped_arguments_are_told_their_order(tiny_model):
    picture = Image.new("RGB", (8, 8))
    for call in (tiny_model.attention_map, tiny_model.match, tiny_model.similarity):
        with pytest.raises(ValueError, match=r"\(media first, then text\)"):
            call("a red star", picture)
    with pytest.raises(TextError, match=r"not a Image \(text first, then media\)"):
        tiny_model.fill_mask(picture, "a <mask> star")


def test_an_enormous_picture_is_refused_before_it_is_decoded(tiny_model):
    bomb = Image.new("1", (20_000, 20_000))
    with pytest.raises(MediaError, match="more than 89478485 pixels"):
        tiny_model.encode_images(bomb)


def test_a_picture_of_one_pixel_is_a_picture(tiny_model):
    np.testing.assert_allclose(np.linalg.norm(tiny_model.encode_images(png(1, 1))), 1.0, atol=1e-6)


def test_of_an_animation_the_first_frame_is_the_image_and_all_are_the_clip(tiny_model):
    first = tiny_model.encode_images(gif())
    still = np.full((30, 40, 3), 60, np.uint8)
    np.testing.assert_allclose(first, tiny_model.encode_images(still), atol=1e-5)
    frames = np.stack([np.full((30, 40, 3), level, np.uint8) for level in (60, 180)])  # the first and the last
    np.testing.assert_allclose(tiny_model.encode_videos(gif()), tiny_model.encode_videos(frames), atol=1e-5)


def test_a_still_picture_is_no_clip(tiny_model):
    with pytest.raises(MediaError, match="an image, not a clip"):
        tiny_model.encode_videos(png())


def test_a_broken_animation_is_refused_by_its_name(tiny_model, monkeypatch):
    def broken(*_):
        raise SyntaxError("broken PNG file")  # which Pillow raises, among others

    animation = Image.open(io.BytesIO(gif()))
    for name in ("seek", "copy"):
        with monkeypatch.context() as patch:
            patch.setattr(animation, name, broken)
            with pytest.raises(MediaError, match="PIL image of 40x30 pixels: cannot decode .*broken PNG file"):
                tiny_model.encode_videos(animation)


def test_images_and_clips_are_not_mixed(tiny_model):
    with pytest.raises(MediaError, match="give them apart"):
        tiny_model.match([png(), CLIP], "a red star")


def test_a_text_that_is_no_valid_unicode_is_refused(tiny_model):
    with pytest.raises(TextError, match=r"no valid Unicode: character 2 is U\+D800"):
        tiny_model.encode_texts(["a red star", "a\ud800b"])


@pytest.mark.parametrize(("text", "message"), [("", "empty"), (" \n", "empty"), ("a" * 10_001, "at most 10000")])
def test_empty_and_enormous_texts_are_refused(tiny_model, text, message):
    with pytest.raises(TextError, match=message):
        tiny_model.encode_texts(text)


def test_a_text_that_is_too_long_is_cut_with_a_warning(tiny_model):
    with pytest.warns(UserWarning, match="reads 16 tokens: cut after"):
        tiny_model.encode_texts("a red star " * 20)


def test_a_text_without_a_mask_cannot_be_filled(tiny_model):
    with pytest.raises(TextError, match="no <mask>"):
        tiny_model.fill_mask("a red star", png())


def test_lists_of_different_length_are_not_paired(tiny_model):
    with pytest.raises(ValueError, match="2 images or clips and 3 texts"):
        tiny_model.match([png(), png()], ["a", "b", "c"])


def test_a_head_that_the_checkpoint_lacks_is_named(tmp_path):
    model = scl_jax.load(str(write_run(tmp_path, PRETRAINING)))
    for call in (
        lambda: model.answer(png(), "what colour?"),
        lambda: model.entails(png(), "a red star"),
        lambda: model.compare(png(), png(), "a red star"),
    ):
        with pytest.raises(MissingHeadError, match="lacks; it has: contrastive, matching, masked_language"):
            call()


def test_numbers_below_one_are_refused(tiny_model, tiny_run):
    for call in (
        lambda: tiny_model.rank("a red star", [png()], -1),
        lambda: tiny_model.fill_mask("a <mask> star", png(), 0),
        lambda: tiny_model.answer(png(), "what colour?", -480),
    ):
        with pytest.raises(ValueError, match="at least one answer"):
            call()
    for sizes in ((), (0,), (8, -1)):
        with pytest.raises(ValueError, match="numbers from 1 on"):
            scl_jax.load(str(tiny_run), batch_sizes=sizes)


def test_an_unknown_checkpoint_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        scl_jax.load(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="without a checkpoint"):
        scl_jax.load(str(tmp_path))
    (tmp_path / "weights.pt").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="HTML"):
        scl_jax.load(str(tmp_path / "weights.pt"))


def test_the_command_answers_in_json(tiny_run, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scl_jax.inference.load", lambda name, **options: tiny_model)
    picture = tmp_path / "red.png"
    picture.write_bytes(png())
    main([str(tiny_run), "match", str(picture), "--text", "a red star", "--text", "a blue ring"])
    assert len(json.loads(capsys.readouterr().out)) == 2
    main([str(tiny_run), "rank", str(picture), "--text", "a red star", "--text", "a blue ring", "-k", "1"])
    (best,) = json.loads(capsys.readouterr().out)
    assert best["item"] in ("a red star", "a blue ring")
    main([str(tiny_run), "rank", "--text", "a red star", str(picture), str(picture), "-k", "2"])  # files at the end
    assert [one["item"] for one in json.loads(capsys.readouterr().out)] == [str(picture)] * 2
    main([str(tiny_run), "encode", str(picture), "--text", "a red star"])
    assert len(json.loads(capsys.readouterr().out)["images"][str(picture)]) == 16
    main([str(tiny_run), "attention", str(picture), "--text", "a red star", "--out", str(tmp_path / "map.png")])
    assert json.loads(capsys.readouterr().out)["words"] == ["a", "red", "star"]
    assert Image.open(tmp_path / "map.png").width > 300
    monkeypatch.setattr("scl_jax.inference.__main__._SPEED_ITEMS", 8)
    main([str(tiny_run), "speed"])
    assert json.loads(capsys.readouterr().out)["texts_per_second"] > 0


def test_a_picture_without_a_name_takes_one_that_is_free(tiny_run, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scl_jax.inference.load", lambda name, **options: tiny_model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "red.png").write_bytes(png())
    for expected in ("attention.png", "attention_2.png", "attention_3.png"):
        main([str(tiny_run), "attention", "red.png", "--text", "a red star"])
        assert json.loads(capsys.readouterr().out)["picture"] == expected


def test_a_reader_that_leaves_ends_the_command_quietly():
    program = "from scl_jax.inference.answers import print_json; print_json(['a line'] * 1000); print('not reached')"
    command = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout and command.stderr
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait(60) == 0


def test_the_command_ends_bad_input_with_one_line(tiny_run, tmp_path):
    with pytest.raises(SystemExit, match="error: match takes at least 1 file"):
        main([str(tiny_run), "match", "--text", "a red star"])
    with pytest.raises(SystemExit, match="error: .*missing.jpg: no such file"):
        main([str(tiny_run), "match", "missing.jpg", "--text", "a red star"])
