"""The authors' files are read as data; hostile and broken ones are refused by name."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
import toy_run
from PIL import Image
from tiny_model import png

from scl_jax.evaluation.alignment import PickleError, align_bench, read_pickle, toy_examples
from scl_jax.evaluation.alignment.__main__ import main
from scl_jax.evaluation.alignment.files import find_phrase


def annotation(**changes):
    mask = np.zeros((48, 64), bool)
    mask[10:20, 5:30] = True
    region = {"bbox_mask": [5.7, 10.2, 30.0, 20.9], "pixel_mask": mask, **changes}
    return {"caption": "A Red star, above a ring.", "annotation": {"red star": [region], "ring": [region, region]}}


def write_bench(folder, content, protocol=4, name="7"):
    for part in ("images", "pkls"):
        (folder / part).mkdir(exist_ok=True)
    (folder / "images" / f"{name}.jpg").write_bytes(png())
    (folder / "pkls" / f"{name}.pkl").write_bytes(pickle.dumps(content, protocol))
    return folder


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda x: np.asfortranarray(x), lambda x: x.astype(">f4")])
def test_arrays_and_tensors_are_read_as_they_were(tmp_path, protocol, kind):
    content = annotation(pixel_mask=kind(annotation()["annotation"]["ring"][0]["pixel_mask"]))
    (example,) = align_bench(write_bench(tmp_path, content, protocol))
    region = example.phrases[0].regions[0]
    np.testing.assert_array_equal(region.mask[0], annotation()["annotation"]["ring"][0]["pixel_mask"])
    assert region.boxes.tolist() == [[5, 10, 30, 20]]
    assert [phrase.span for phrase in example.phrases] == [(2, 10), (20, 24)]


@pytest.mark.parametrize(
    "data", [{"a": [1, 2.5, None, True, "b", b"c", (1, 2)]}, np.float32(3), np.arange(6).reshape(2, 3)]
)
def test_plain_data_is_read(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(data))
    found = read_pickle(tmp_path / "x.pkl")
    if isinstance(data, dict):
        assert found == {"a": [1, 2.5, None, True, "b", b"c", [1, 2]]}
    else:
        np.testing.assert_array_equal(found, data)


class Shell:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path):
    content = annotation(pixel_mask=Shell(tmp_path / "pwned"))
    with pytest.raises(PickleError, match=r"7.pkl: refused: it names (posix|nt).system"):
        list(align_bench(write_bench(tmp_path, content)))
    assert not (tmp_path / "pwned").exists()


class BeyondItsStorage:
    def __reduce__(self):
        storage = torch.arange(4).bool().storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, (10**6, 10**6), (10**6, 1), False, {})


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(BeyondItsStorage()))
    with pytest.raises(PickleError, match="out of bounds"):
        read_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    "hostile",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cscl_jax.evaluation.alignment.plain_pickle\n_storage\n(tR.",
        b"ctorch\nload\n(tR.",
        b"\x80\x02X\x01\x00\x00\x00ar\xff\xff\xff\x7f.",  # asks for two thousand million memory slots
        b"\x80\x04broken",
        b"",
        pickle.dumps(np.array([object()])),
        b"cnumpy\ndtype\n(S'O8'\ntR.",
    ],
)
def test_hostile_and_broken_pickles_are_refused(tmp_path, hostile):
    (tmp_path / "x.pkl").write_bytes(hostile)
    with pytest.raises(PickleError, match="x.pkl"):
        read_pickle(tmp_path / "x.pkl")


def test_annotations_of_another_form_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(PickleError, match=r"7.pkl: not an annotation of ALIGN-BENCH \(KeyError"):
        list(align_bench(write_bench(tmp_path, {"caption": "x"})))
    with pytest.raises(PickleError, match=r"a mask of shape \(2, 3\), but the image has 64x48"):
        list(align_bench(write_bench(tmp_path, annotation(pixel_mask=np.ones((2, 3), bool)))))
    with pytest.raises(FileNotFoundError, match="holds no .pkl file and .*/images/images no .json"):
        list(align_bench(tmp_path / "images"))
    (tmp_path / "images" / "7.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="7.jpg is missing"):
        list(align_bench(tmp_path))


def test_json_with_boxes_beside_the_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    file = tmp_path / "images" / "a.json"
    boxes = {"Red star": [[5.7, 10, 30, 20]], "ring": [[0, 0, 8, 8], [60, 40, 70, 48]]}
    file.write_text(json.dumps({"caption": "A red star, above a ring.", "annotation": boxes}))
    (example,) = align_bench(tmp_path)
    star, ring = example.phrases
    assert (star.span, ring.span) == ((2, 10), (20, 24)) and len(ring.regions) == 2
    assert star.regions[0].boxes.tolist() == [[5, 10, 30, 20]] and star.regions[0].mask.sum() == 25 * 10
    assert star.regions[0].mask[0, 10:20, 5:30].all() and ring.regions[1].mask.sum() == 4 * 8
    for box in (
        [0.1, 0.1, 0.5, 0.5],
        [70, 0, 80, 9],
        [9, 0, 5, 9],
        [0, 0, 5, float("nan")],
        [1, 2, 3],
        [0, 0, 5, 10**400],
        "abcd",
    ):
        file.write_text(json.dumps({"caption": "a ring", "annotation": {"ring": [box]}}))
        with pytest.raises(ValueError, match=r"a.json: box .* of an image of 64x48"):
            list(align_bench(tmp_path))
    file.write_text("{")
    with pytest.raises(ValueError, match=r"a.json: no JSON"):
        list(align_bench(tmp_path))


def test_boxes_are_those_of_the_upright_picture(tmp_path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: 48 wide and 64 high when it is looked at
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "a.jpg", exif=exif)
    (tmp_path / "images" / "a.json").write_text('{"caption": "a ring", "annotation": {"ring": [[0, 50, 48, 64]]}}')
    (example,) = align_bench(tmp_path)
    (region,) = example.phrases[0].regions
    assert region.boxes.tolist() == [[0, 50, 48, 64]] and region.mask.shape == (1, 64, 48)


def test_a_phrase_is_found_as_whole_words_whatever_its_capitals():
    assert find_phrase("red  Star", "the reddish red\nstar") == (12, 20)
    assert find_phrase("star", "stars and starlight") is None
    assert find_phrase(" ", "a") is None


def test_the_command_scores_the_authors_files(tiny_model, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scl_jax.inference.load", lambda name, **options: tiny_model)
    write_bench(tmp_path, annotation())
    out = tmp_path / "out" / "alignment.json"
    main([str(tiny_run), f"--align_bench={tmp_path}", f"--out={out}", "--pictures=1"])
    summary = json.loads(capsys.readouterr().out)
    assert 0 < summary["local/box"] < 1 and summary["images"] == 1
    assert json.loads(out.read_text())["summary"] == summary
    assert (tmp_path / "out" / "alignment" / "7.png").exists()
    main([str(tiny_run), f"--align_bench={tmp_path}", f"--out={tmp_path / 'scores'}", "--pictures=1"])
    assert json.loads((tmp_path / "scores").read_text())["summary"] == summary
    assert (tmp_path / "scores_pictures" / "7.png").exists()
    with pytest.raises(SystemExit, match="is a folder: name a JSON file"):
        main([str(tiny_run), f"--align_bench={tmp_path}", f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match="error: .*holds no .pkl"):
        main([str(tiny_run), f"--align_bench={tmp_path / 'images'}"])


@pytest.mark.parametrize("option", ["--max_items=-1", "--pictures=-1"])
def test_the_command_refuses_numbers_below_0(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", option])
    assert ended.value.code == 2 and "'-1' is no whole number from 0 on" in capsys.readouterr().err


@pytest.mark.slow
def test_the_toy_worlds_own_boxes_are_scored(tiny_model, tmp_path):
    toy_run.prepare(tmp_path)
    for kind, frames in (("images", 1), ("videos", 2)):
        for example in toy_examples(f"toy_world/{kind}", "test", tmp_path, frames, max_items=3):
            for phrase in example.phrases:
                assert example.caption[slice(*phrase.span)] == phrase.text
                (region,) = phrase.regions
                assert region.mask.shape == (frames, 96, 96)
                np.testing.assert_array_equal(region.filled() & region.mask, region.mask)
