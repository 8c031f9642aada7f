"""The index of a folder: exact answers, broken files listed, other checkpoints refused."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from tiny_model import png, scenes

from scl_jax import search
from scl_jax.search import Index, build, main, top_k


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures, a clip, two broken files and a note, in two folders."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "deeper").mkdir()
    for number, record in enumerate(scenes("images", 5)):
        (root / ("deeper" if number > 2 else "") / f"scene {number}.jpg").write_bytes(record["media"])
    (root / "clip.mp4").write_bytes(scenes("videos", 1)[0]["media"])
    (root / "broken.png").write_bytes(png()[:50])
    (root / "empty.mp4").write_bytes(b"")
    (root / "notes.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def index(tiny_model, folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("search") / "index"
    build(tiny_model, folder, target)
    return Index(target)


def test_top_k_over_chunks_is_the_order_of_a_plain_sort():
    rng = np.random.default_rng(0)
    features, query = rng.normal(size=(1000, 8)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    exact = features.astype(np.float64) @ query.astype(np.float64)
    expected = np.argsort(-exact, kind="stable")
    rounding = 8 * np.finfo(np.float32).eps * (np.abs(features) @ np.abs(query))  # of a sum of eight, in any order
    for k, chunk in ((10, 64), (1, 1024), (2000, 333)):
        ids, scores = top_k(features, query, k, chunk)
        np.testing.assert_array_equal(ids, expected[: min(k, 1000)])
        assert (np.abs(scores - exact[ids]) <= rounding[ids]).all()


def test_every_readable_file_is_indexed_and_the_others_are_listed(index, tiny_model, folder):
    assert sorted(index.items) == [
        "clip.mp4",
        *(f"deeper/scene {i}.jpg" for i in (3, 4)),
        *(f"scene {i}.jpg" for i in range(3)),
    ]
    assert sorted(one["path"] for one in index.manifest["broken"]) == ["broken.png", "empty.mp4"]
    assert isinstance(index.features, np.memmap)
    for name, feature in zip(index.items, index.features, strict=True):
        np.testing.assert_allclose(feature, tiny_model.encode_media(folder / name)[0], atol=1e-5)


def test_a_picture_finds_itself_and_a_text_the_most_similar(index, tiny_model, folder):
    best = index.query(tiny_model.encode_images(folder / "scene 1.jpg")[0], k=1)[0]
    assert best.path == "scene 1.jpg" and best.similarity == pytest.approx(1.0, abs=1e-5)
    feature = tiny_model.encode_texts("a red star")[0]
    found = index.query(feature, k=3)
    assert [one.path for one in found] == [index.items[i] for i in np.argsort(-(index.features @ feature))[:3]]


def test_faiss_takes_over_above_its_threshold(tiny_model, folder, tmp_path):
    build(tiny_model, folder, tmp_path / "index", faiss_above=2)
    index = Index(tmp_path / "index")
    assert "IVF" in index.manifest["faiss"]
    assert index.query(tiny_model.encode_images(folder / "scene 1.jpg")[0], k=1)[0].path == "scene 1.jpg"


def test_without_faiss_every_item_is_compared(tiny_model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_faiss", lambda: None)
    manifest = build(tiny_model, folder, tmp_path / "index", faiss_above=2)
    assert "pip install" in manifest["faiss"]
    assert len(Index(tmp_path / "index").query(tiny_model.encode_texts("a red star")[0], k=20)) == 6


def test_files_of_any_name_are_found_by_it(tiny_model, tmp_path, monkeypatch, capsys):
    names = [b"caf\xe9.png", "a line\u2028and another.png".encode(), b"two\nlines.png", b"~tmp.png"]
    (tmp_path / "pictures").mkdir()
    for name in names:
        (tmp_path / "pictures" / os.fsdecode(name)).write_bytes(png())
    (tmp_path / "pictures" / os.fsdecode(b"broken\xe9.png")).write_bytes(b"")
    monkeypatch.chdir(tmp_path / "pictures")
    build(tiny_model, ".", tmp_path / "index")
    monkeypatch.setattr(search, "load", lambda name: tiny_model)
    main(["query", str(tmp_path / "index"), "--media", "~tmp.png"])
    found = json.loads(capsys.readouterr().out)
    assert sorted(os.fsencode(one["path"]) for one in found) == sorted(names)


def test_bad_input_is_said(index, tiny_model, folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no image or video"):
        build(tiny_model, tmp_path, tmp_path / "index")
    with pytest.raises(FileExistsError, match="--overwrite"):
        build(tiny_model, folder, index.folder)
    for target in (folder, folder.parent):
        with pytest.raises(ValueError, match="which is read"):
            build(tiny_model, folder, target, overwrite=True)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(FileExistsError, match="choose another target"):
        build(tiny_model, folder, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="none of 1 files can be read"):
        build(tiny_model, tmp_path, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    with pytest.raises(FileNotFoundError, match="no index"):
        Index(tmp_path)
    with pytest.raises(ValueError, match="at least one answer"):
        index.query(index.features[0], k=-1)
    monkeypatch.setattr(tiny_model, "fingerprint", "another")
    with pytest.raises(ValueError, match="built with another checkpoint"):
        index.check(tiny_model)


@pytest.mark.parametrize(
    "part, content",
    [
        ("manifest.json", b"{"),
        ("manifest.json", b"[]"),
        ("manifest.json", b'{"width": 16}'),
        ("items.txt", b"\xff"),
        ("features.npy", b"features"),
        ("faiss.index", b"a hundred items"),
    ],
)
def test_a_damaged_index_is_said_by_its_name(index, tmp_path, part, content):
    damaged = tmp_path / "damaged"
    shutil.copytree(index.folder, damaged)
    (damaged / part).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.* build (it|the index) again"):
        Index(damaged)


def test_the_command_builds_and_queries(tiny_model, tiny_run, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "load", lambda name: tiny_model)
    monkeypatch.chdir(tiny_run.parent)
    main(["build", str(folder), str(tmp_path / "index"), f"--checkpoint={tiny_run.name}"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["items"] == 6 and "left out:" in printed.err
    assert json.loads(printed.out)["checkpoint"] == str(tiny_run)  # to be found from any folder
    main(["query", str(tmp_path / "index"), "--text", "a red star", "-k", "2"])
    assert len(json.loads(capsys.readouterr().out)) == 2
    with pytest.raises(SystemExit, match="error: .*no index"):
        main(["query", str(tmp_path), "--text", "a red star"])
