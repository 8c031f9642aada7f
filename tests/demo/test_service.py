"""What the page answers: the model's own numbers, and a sentence for whatever cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_model import PRETRAINING, gif, png, png_header, scenes, write_run

import scl_jax
from scl_jax.demo.__main__ import main, parser, prepare
from scl_jax.demo.service import Service
from scl_jax.inference import MediaError, MissingHeadError, TextError
from scl_jax.search import Index, build


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "pictures"
    folder.mkdir()
    for number, record in enumerate(scenes("images", 4)):
        (folder / f"scene {number}.jpg").write_bytes(record["media"])
    (folder / "clip.mp4").write_bytes(scenes("videos", 1)[0]["media"])
    build(tiny_model, folder, folder.parent / "index")
    return Service([tiny_model], Index(folder.parent / "index"), largest_upload=0.5)


@pytest.fixture
def upload(tmp_path):
    def write(data, name="holiday.png"):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def test_a_search_shows_the_most_similar_files(service, tiny_model):
    hits = service.search("a red star", 5)
    expected = service.index.query(tiny_model.encode_texts("a red star")[0], 5)
    assert [(hit.name, hit.similarity) for hit in hits] == [(one.path, one.similarity) for one in expected]
    assert {hit.name for hit in hits} >= {"clip.mp4"}  # a clip is shown by its middle frame
    assert all(max(hit.picture.size) <= 320 for hit in hits)


def test_a_file_that_has_gone_since_is_left_out_with_a_note(tiny_model, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    build(tiny_model, tmp_path, tmp_path / "index")
    service = Service([tiny_model], Index(tmp_path / "index"))
    (tmp_path / "a.png").unlink()
    with pytest.warns(UserWarning, match=r"a\.png cannot be read any more"):
        assert [hit.name for hit in service.search("a red star", 5)] == ["b.png"]


def test_pictures_of_the_folder_are_shown_and_no_other_file(service):
    assert [hit.name for hit in service.examples(2)] == ["scene 0.jpg", "scene 1.jpg"]
    assert service.picture_of("scene 0.jpg").size == (96, 96)
    for name in ("../index/manifest.json", "/etc/passwd"):
        with pytest.raises(ValueError, match="is not in the folder"):
            service.picture_of(name)


def test_a_clip_keeps_its_shape(tiny_model, tmp_path):
    (tmp_path / "moving.mp4").write_bytes(gif())  # 40 pixels wide, 30 high
    build(tiny_model, tmp_path, tmp_path / "index")
    service = Service([tiny_model], Index(tmp_path / "index"))
    assert service.picture_of("moving.mp4").size == (40, 30)
    assert service.picture_of("moving.mp4", 20).size == (20, 15)


def test_a_look_gives_the_models_scores_and_a_map_for_each_word(service, tiny_model, upload):
    data = png(60, 30)
    sight = service.look(upload(data), "a red star")
    assert sight.match == pytest.approx(tiny_model.match(data, "a red star"), abs=1e-6)
    assert sight.similarity == pytest.approx(float(tiny_model.similarity(data, "a red star")[0, 0]), abs=1e-6)
    assert [word for _, word in sight.maps] == ["whole text", "red", "star"]
    assert {picture.size for picture, _ in sight.maps} == {(448, 224)}  # the shape of the picture


def test_answers_and_masked_words_are_the_models(service, tiny_model, upload):
    file = upload(png())
    assert service.answer(file, "what colour?", 3) == tiny_model.answer(png(), "what colour?", 3)
    assert service.fill(file, "a <mask> star", 2) == tiny_model.fill_mask("a <mask> star", png(), 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "choose a picture first"),
        (b"", "holiday.png: cannot decode image: empty file. Pictures may be JPEG"),
        (b"no picture at all", "holiday.png: cannot decode image: no image format known here"),
        (png()[:60], "^holiday.png: cannot decode PNG"),
        (scenes("videos", 1)[0]["media"], "holiday.png: cannot decode image"),
        (png_header(20_000, 20_000), "holiday.png: image has far more than 89478485 pixels"),
        (png_header(10_000, 10_000), "holiday.png: image of 10000x10000 has more than 89478485 pixels"),
        (png() + bytes(2**20), r"holiday.png has 1.0 MiB, and at most 0.5 are taken"),
    ],
)
def test_what_is_no_picture_is_said_with_the_users_name_of_it(service, upload, data, message):
    file = None if data is None else upload(data)
    for call in (service.look, service.answer, service.fill):
        with pytest.raises(MediaError, match=message) as caught:
            call(file, "a <mask>")
        assert "/" not in str(caught.value).replace("<mask>", "")  # no path of the server
    assert service.answer(upload(png(), "good.png"), "what colour?")  # and the service goes on


def test_pictures_of_one_pixel_and_animations_are_pictures(service, tiny_model, upload):
    assert service.look(upload(png(1, 1)), "a red star").maps[0][0].size == (448, 448)
    assert service.look(upload(png(1, 3000)), "a red star").maps[0][0].size == (1, 448)
    assert service.answer(upload(gif(), "moving.gif"), "what colour?") == tiny_model.answer(gif(), "what colour?")


@pytest.mark.parametrize(("text", "message"), [("", "empty"), (" \n", "empty"), ("a" * 10_001, "at most 10000")])
def test_empty_and_enormous_texts_are_said(service, upload, text, message):
    for call in (service.look, service.answer, service.fill):
        with pytest.raises(TextError, match=message):
            call(upload(png()), text)
    with pytest.raises(TextError, match=message):
        service.search(text, 3)


def test_a_head_that_no_checkpoint_has_is_said_with_what_to_start(tmp_path, upload, tiny_model):
    plain = scl_jax.load(str(write_run(tmp_path / "plain", PRETRAINING)), batch_sizes=(1,))
    with pytest.raises(MissingHeadError, match=r"'vqa', and .*run has none. Start the demo .*configs/vqa.py"):
        Service([plain]).answer(upload(png()), "what colour?")
    with pytest.raises(ValueError, match="start the demo with --folder"):
        Service([plain]).search("a red star", 3)
    both = Service([plain, tiny_model])  # the second has what the first lacks
    assert both.answer(upload(png()), "what colour?") == tiny_model.answer(png(), "what colour?")
    assert both.with_head("matching") is plain


def test_the_command_prepares_toy_scenes_and_keeps_an_index(tiny_run, tmp_path):
    (tmp_path / "toys").mkdir()  # empty, as a folder that was made for the index
    arguments = [f"--checkpoint={tiny_run}", "--toy_scenes=3", f"--index={tmp_path / 'toys'}"]
    for place in ("first", "second"):  # a folder of its own each, gone after the demo
        service = prepare(parser().parse_args(arguments), tmp_path / place)
        assert len(service.index.items) == 3 and service.examples(1)[0].picture.size == (96, 96)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "black.png")
    arguments = [f"--checkpoint={tiny_run}", f"--folder={tmp_path}", f"--index={tmp_path / 'kept'}"]
    for _ in range(2):  # built, then found again
        assert prepare(parser().parse_args(arguments), tmp_path).index.items
    arguments[1] = f"--folder={tmp_path / 'kept'}"
    with pytest.raises(ValueError, match="is the index of"):
        prepare(parser().parse_args(arguments), tmp_path)


def test_the_command_ends_unknown_checkpoints_and_folders_with_one_line(tiny_run, tmp_path):
    with pytest.raises(SystemExit, match="error: .*nothing: no such file or folder"):
        main([f"--checkpoint={tmp_path / 'nothing'}"])
    with pytest.raises(SystemExit, match="error: .*no image or video"):
        main([f"--checkpoint={tiny_run}", f"--folder={tmp_path}"])


@pytest.mark.parametrize("wrong", ["--port=0", "--port=65536", "--max_upload=0", "--max_upload=nan", "--toy_scenes=-1"])
def test_numbers_out_of_range_are_named_before_anything_is_loaded(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint=nothing", wrong])
    assert f"error: {wrong}: " in capsys.readouterr().err
