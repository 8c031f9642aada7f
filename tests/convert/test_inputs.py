"""Sizes of inputs and tokenizers go from a run to a PyTorch folder, to a converted one, and back."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from tiny_model import scenes

import scl_jax
from scl_jax.convert.checkpoints import is_run
from scl_jax.convert.rules import ConversionError
from scl_jax.convert.to_flax import to_flax
from scl_jax.convert.to_torch import to_torch
from scl_jax.data.tokens import train_tokenizer
from scl_jax.data.video import decode_frames
from scl_jax.inference import MediaError
from scl_jax.inference.weights import Weights, read_weights

LONG = "a red star is left of a blue ring " * 6


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, exported to PyTorch, converted from there, and exported once more."""
    base = tmp_path_factory.mktemp("there_and_back")
    found = {"run": tiny_run} | {name: base / name for name in ("exported", "converted", "again")}
    to_torch(tiny_run, found["exported"], say=quiet)
    to_flax(found["exported"], found["converted"], say=quiet)
    to_torch(found["converted"], found["again"], say=quiet)
    return found


def inputs(weights: Weights) -> tuple[int, int, int, int]:
    return weights.text_length, weights.image_size, weights.video_size, weights.video_frames


def test_inputs_are_the_same_there_and_back(folders: dict[str, Path]) -> None:
    assert {name: inputs(read_weights(str(path))) for name, path in folders.items()} == dict.fromkeys(
        folders, (16, 64, 64, 2)
    )
    noted = [json.loads((folders[name] / "config.json").read_text()) for name in ("exported", "again")]
    assert noted[0] == noted[1]


def test_a_converted_model_gives_the_numbers_of_its_source(folders: dict[str, Path], tiny_model) -> None:
    clip = scenes("videos", 1)[0]["media"]
    converted = scl_jax.load(str(folders["converted"]), batch_sizes=(1,))
    np.testing.assert_allclose(converted.encode_videos(clip), tiny_model.encode_videos(clip), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is cut
        np.testing.assert_allclose(converted.encode_texts(LONG), tiny_model.encode_texts(LONG), atol=1e-5)


def test_sizes_that_are_asked_for_go_before_those_noted(folders: dict[str, Path], tmp_path: Path) -> None:
    to_flax(folders["exported"], tmp_path / "larger", image_size=96, frames=3, say=quiet)
    assert inputs(read_weights(str(tmp_path / "larger"))) == (16, 96, 96, 3)


def test_a_model_may_see_one_frame_of_a_clip(folders: dict[str, Path], tmp_path: Path) -> None:
    to_flax(folders["exported"], tmp_path / "still", frames=1, say=quiet)
    model = scl_jax.load(str(tmp_path / "still"), batch_sizes=(1,))
    clip, picture = scenes("videos", 1)[0]["media"], scenes("images", 1)[0]["media"]
    assert model.video_frames == 1
    frame = decode_frames(clip, 1)
    np.testing.assert_allclose(model.encode_media(clip), model.encode_images(frame[0]), atol=1e-5)
    np.testing.assert_array_equal(model.encode_videos(frame), model.encode_videos(clip))
    assert model.attention_map(clip, "a red star").frames.shape == (1, 64, 64, 3)
    with pytest.raises(MediaError, match="not one of each"):
        model.compare(clip, picture, "a red star")


def test_a_run_trained_with_a_kernel_of_another_platform_is_loaded(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = json.loads((run / "config.json").read_text())
    config["model"]["attention"] = "mosaic"
    (run / "config.json").write_text(json.dumps(config))
    assert scl_jax.load(str(run), batch_sizes=(1,)).encode_texts("a red star").shape == (1, 16)


def test_what_weights_do_not_show_goes_there_and_back(tiny_run: Path, tmp_path: Path) -> None:
    """The heads of either encoder, dropout, the temperature at the start."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = json.loads((run / "config.json").read_text())
    config["model"] |= {"dropout": 0.3, "initial_temperature": 0.2}
    for part, heads in (("vision", 4), ("text", 8), ("fusion", 8)):
        config["model"][part]["heads"] = heads
    (run / "config.json").write_text(json.dumps(config))
    to_torch(run, tmp_path / "exported", say=quiet)
    to_flax(tmp_path / "exported", tmp_path / "converted", say=quiet)
    model = json.loads((tmp_path / "converted" / "config.json").read_text())["model"]
    assert [model[part]["heads"] for part in ("vision", "text", "fusion")] == [4, 8, 8]
    assert (model["dropout"], model["initial_temperature"]) == (0.3, 0.2)


def test_without_a_note_the_tables_say_what_fits(folders: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folders["exported"], bare)
    settings = json.loads((bare / "config.json").read_text())
    del settings["inputs"]
    (bare / "config.json").write_text(json.dumps(settings))
    to_flax(bare, tmp_path / "converted", say=quiet)
    for folder in (bare, tmp_path / "converted"):  # 34 positions
        assert inputs(read_weights(str(folder))) == (32, 64, 64, 2)


def test_a_text_never_is_longer_than_the_positions(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["exported"], tmp_path / "exported")
    settings = json.loads((tmp_path / "exported" / "config.json").read_text())
    settings["inputs"]["text_length"] = 50
    (tmp_path / "exported" / "config.json").write_text(json.dumps(settings))
    assert read_weights(str(tmp_path / "exported")).text_length == 32
    settings["inputs"] = {"text_length": 16}
    (tmp_path / "exported" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match="image_size"):
        to_flax(tmp_path / "exported", tmp_path / "converted", say=quiet)
    assert not (tmp_path / "converted").exists()


def test_a_run_of_clips_alone_is_exported_with_the_size_of_its_clips(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["images"].update(datasets=["toy_world/images"], share=0.0, image_size=96)  # named, but off
    config["data"]["videos"].update(datasets=["toy_world/videos"], share=1.0, image_size=80)
    (run / "config.json").write_text(json.dumps(config))
    to_torch(run, tmp_path / "exported", say=quiet)
    assert [inputs(read_weights(str(tmp_path / name))) for name in ("run", "exported")] == [(16, 80, 80, 2)] * 2


def test_a_converted_folder_has_its_own_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["converted"], tmp_path / "moved")
    config = (tmp_path / "moved" / "config.json").read_text()
    assert str(folders["exported"].parent) not in config
    found, source = read_weights(str(tmp_path / "moved")), read_weights(str(folders["run"]))
    assert found.tokenizer.folder == str(tmp_path / "moved" / "tokenizer")
    np.testing.assert_array_equal(
        found.tokenizer.encode(LONG, 16)["token_ids"], source.tokenizer.encode(LONG, 16)["token_ids"]
    )
    assert (folders["again"] / "tokenizer.json").exists() and found.answers == source.answers


def test_a_tokenizer_folder_that_is_asked_for_is_copied_and_a_hub_name_is_kept(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str) -> Path:
        raise FileNotFoundError(f"{name}: no connection")

    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folders["exported"] / "model.safetensors", bare)
    convert = functools.partial(to_flax, bare / "model.safetensors", heads=2, vision_heads=2, say=quiet)
    convert(tmp_path / "a", tokenizer=str(folders["exported"]))
    assert (tmp_path / "a" / "tokenizer" / "tokenizer.json").exists()
    monkeypatch.setattr("scl_jax.data.tokens._from_hub", unreachable)
    convert(tmp_path / "b", tokenizer="me/words")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["data"]["tokenizer"] == "me/words"
    (bare / "tokenizer.json").write_text("{}")  # beside the weights, and broken
    with pytest.raises(ValueError, match="tokenizer"):
        convert(tmp_path / "c")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "bare"]


@pytest.fixture(scope="module")
def too_many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of more tokens than the tiny model has, which are 330."""
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [f"{first}{second}{third}" for first in "abcdefg" for second in "hijklmn" for third in "opqrstu"] * 2
    assert train_tokenizer(lines, folder, 400).vocab_size > 330
    return str(folder)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(
    folders: dict[str, Path], too_many: str, tmp_path: Path
) -> None:
    message = rf"the tokenizer {too_many} has \d+ tokens, but the model knows 330: give the one"
    for folder in folders.values():
        with pytest.raises(ConversionError, match=message):
            read_weights(str(folder), tokenizer=too_many)
    for dry_run in (True, False):
        with pytest.raises(ConversionError, match=message):
            to_flax(folders["exported"], tmp_path / "out", tokenizer=too_many, dry_run=dry_run, say=quiet)
    with pytest.raises(ConversionError, match=message):
        to_torch(folders["run"], tmp_path / "out", tokenizer=too_many, say=quiet)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_own_tokenizer_does_not_fit_is_exported_without(
    folders: dict[str, Path], too_many: str, tmp_path: Path
) -> None:
    shutil.copytree(folders["run"], tmp_path / "run")
    shutil.copytree(too_many, tmp_path / "run" / "tokenizer", dirs_exist_ok=True)
    lines: list[str] = []
    to_torch(tmp_path / "run", tmp_path / "out", say=lines.append)
    assert any("tokenizer: left out" in line for line in lines)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_heads_of_an_exported_folder_are_said_to_be_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    lines: list[str] = []
    to_flax(folders["exported"], tmp_path / "out", dry_run=True, say=lines.append)
    assert "heads: text and fusion 2, vision 2 (config.json)" in lines
    assert f"tokenizer: copied from {folders['exported']}" in lines


@pytest.mark.parametrize("damage", ["_METADATA", "d/*", ""])
def test_a_damaged_checkpoint_is_named(tiny_run: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.copytree(run / "checkpoints" / "0", run / "checkpoints" / "3")
    state = run / "checkpoints" / "3" / "state"
    for file in state.rglob(damage or "*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if damage else 0])
    with pytest.raises(ValueError, match=rf"{state} cannot be read.* another step \(there are 0\)"):
        read_weights(str(run))
    assert read_weights(str(run), step=0).flat


def test_a_save_that_was_cut_short_makes_no_run(tmp_path):
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not is_run(tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir()
    assert is_run(tmp_path)
