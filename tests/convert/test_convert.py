"""`python -m scl_jax.convert` end to end on the recorded weights, and on files that cannot be converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from golden_case import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from scl_jax.convert import checkpoints, sources, torch_model
from scl_jax.convert.__main__ import main
from scl_jax.convert.checkpoints import read_parameters, write_parameters
from scl_jax.convert.full_model import read_model
from scl_jax.convert.rules import ConversionError

HEADS = ["--heads=4", "--vision_heads=4"]
PRETRAINING_HEADS = ("cl_temp", "itm_score", "mlm_score", "vision_proj", "language_proj")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded models know 200 tokens, fewer than any byte-level tokenizer has: these folders go without."""

    def unreachable(name: str) -> Path:
        raise FileNotFoundError(f"{name}: no connection")

    monkeypatch.setattr("scl_jax.data.tokens._from_hub", unreachable)


def weights_of(tag: str, task: str = "pretraining") -> dict[str, np.ndarray]:
    """Recorded weights, for a fine-tuned task with its own head only."""
    weights = load_file(GOLDEN / f"{tag}.safetensors")
    more = load_file(GOLDEN / f"{tag}_downstream.safetensors")
    if task == "pretraining":
        return weights
    weights = {name: x for name, x in weights.items() if not name.startswith(PRETRAINING_HEADS)}
    head = {"vqa": "vqa_classifier", "nlvr2": "nlvr2_classifier", "retrieval": "rank_output"}.get(task)
    if task == "entailment":
        more = {n.replace("nlvr2", "snli"): x for n, x in more.items() if n.startswith("nlvr2")}
        more["snli_classifier.0.weight"] = np.ascontiguousarray(more["snli_classifier.0.weight"][:, :64])
        more["snli_classifier.3.weight"] = np.ones((3, 64), np.float32)
        more["snli_classifier.3.bias"] = np.ones(3, np.float32)
        return weights | more
    weights |= {name: x for name, x in more.items() if name.startswith(str(head))}
    return weights | ({"token_type_embeddings.weight": more["token_type_embeddings.weight"]} if task == "nlvr2" else {})


@pytest.mark.parity
@pytest.mark.parametrize("task", ["pretraining", "vqa", "nlvr2", "entailment", "retrieval"])
def test_torch_orbax_torch_orbax_is_bit_identical(tag: str, task: str, tmp_path: Path) -> None:
    weights = weights_of(tag, task)
    save_file(weights, tmp_path / "in.safetensors")
    main([str(tmp_path / "in.safetensors"), str(tmp_path / "orbax"), *HEADS])
    main([str(tmp_path / "orbax"), str(tmp_path / "torch")])
    main([str(tmp_path / "torch"), str(tmp_path / "again")])  # the folder knows its heads
    exported = load_file(tmp_path / "torch/model.safetensors")
    for name in set(weights) & set(exported):
        assert weights[name].tobytes() == exported[name].tobytes() and weights[name].shape == exported[name].shape
    assert {n.split(".")[0] for n in set(exported) - set(weights)} == {
        "vision_transformer"
    }  # temporal rows, mask vector
    before, after = read_parameters(tmp_path / "orbax")[0], read_parameters(tmp_path / "again")[0]
    assert checkpoints.checksum(before) == checkpoints.checksum(after)
    assert {path: x.tobytes() for path, x in before.items()} == {path: x.tobytes() for path, x in after.items()}
    written = sorted(file.name for file in (tmp_path / "torch").iterdir())
    assert written == ["README.md", "config.json", "model.safetensors"]
    torch_model.SCL.from_folder(tmp_path / "torch")  # strict


def lightning(path: Path, weights: dict[str, np.ndarray]) -> None:
    state = {name: torch.from_numpy(np.array(x)) for name, x in weights.items()}
    moments = {i: {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)} for i in range(3)}
    optimizer = [{"state": moments, "param_groups": [{"lr": 1e-5, "params": [0, 1, 2]}]}]
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": optimizer}, path)


@pytest.mark.parity
@pytest.mark.parametrize("position_ids", [True, False])
def test_a_lightning_checkpoint_is_the_same_weights(tag: str, tmp_path: Path, position_ids: bool, capsys) -> None:
    weights = weights_of(tag)
    save_file(weights, tmp_path / "plain.safetensors")
    if not position_ids:
        del weights["text_transformer.embeddings.position_ids"]
    lightning(tmp_path / "authors.ckpt", weights)
    for name in ("plain.safetensors", "authors.ckpt"):
        main([str(tmp_path / name), str(tmp_path / "nowhere"), "--dry_run", *HEADS])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checksum")]
    assert len(printed) == 2 and printed[0] == printed[1]


def test_a_dry_run_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(GOLDEN / "tiny_video.safetensors"), str(tmp_path / "out"), "--dry_run", "--image_size=96", *HEADS])
    printed = capsys.readouterr().out
    assert "mapped: 231 tensors" in printed and "checksum: sha256 " in printed
    assert "resized: vision.position_embedding: 17 → 37 rows (resize_position_rows)" in printed
    assert "MAE decoder, unused by SCL" in printed
    assert "initialised: vision.mask_embedding: drawn at random" in printed
    assert "heads: text and fusion 4, vision 4 (as asked)" in printed
    assert not list(tmp_path.iterdir())


def test_what_is_assumed_of_a_bare_file_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(GOLDEN / "tiny_image.safetensors"), str(tmp_path / "out"), "--dry_run"])
    printed = capsys.readouterr().out
    assert "heads: text and fusion 1, vision 1 (width / 64; --heads, --vision_heads)" in printed
    assert "tokenizer: roberta-base (--tokenizer); it cannot be this one, whose 50265 tokens" in printed
    main([str(GOLDEN / "tiny_image.safetensors"), str(tmp_path / "out"), "--dry_run", "--heads=4"])
    assert "text and fusion 4 (as asked), vision 1 (width / 64;" in capsys.readouterr().out


def test_names_of_data_parallel_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_of("tiny_image")
    save_file(weights, tmp_path / "plain.safetensors")
    save_file({f"module.{name}": x for name, x in weights.items()}, tmp_path / "parallel.safetensors")
    for name in ("plain", "parallel"):
        main([str(tmp_path / f"{name}.safetensors"), str(tmp_path / "out"), "--dry_run", *HEADS])
    sums = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checksum")]
    assert len(sums) == 2 and sums[0] == sums[1]
    save_file({f"student.{name}": x for name, x in weights.items()}, tmp_path / "other.safetensors")
    assert "'student." in fails([str(tmp_path / "other.safetensors"), str(tmp_path / "out")], tmp_path)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_become_float32(tmp_path: Path, kind: type) -> None:
    weights = {n: x.astype(kind) if x.dtype == np.float32 else x for n, x in weights_of("tiny_image").items()}
    save_file(weights, tmp_path / "in.safetensors")
    main([str(tmp_path / "in.safetensors"), str(tmp_path / "out"), *HEADS])
    flat, _ = read_parameters(tmp_path / "out")
    assert {x.dtype for x in flat.values()} == {np.dtype(np.float32)}
    expected = weights["text_transformer.embeddings.word_embeddings.weight"].astype(np.float32)
    np.testing.assert_array_equal(flat["text.word_embedding.embedding"], expected)


def fails(arguments: list[str], folder: Path) -> str:
    """The message that the command ends with; it leaves nothing half-written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert sorted(folder.rglob("*")) == before
    message = str(error.value)
    assert message.startswith("error: ")
    return message


def damage(name: str, value) -> dict[str, np.ndarray]:
    weights = {n: np.array(x) for n, x in weights_of("tiny_image").items()}
    weights[name] = value(weights[name])
    return weights


def with_nan(x: np.ndarray) -> np.ndarray:
    x.reshape(-1)[0] = np.nan
    return x


WORDS = "text_transformer.embeddings.word_embeddings.weight"
DAMAGED = {
    "nan": ("itm_score.fc.weight", with_nan, "itm_score.fc.weight (1 NaN"),
    "infinite": ("mlm_score.bias", lambda x: x / 0 + np.inf, "mlm_score.bias ("),
    "integers": ("itm_score.fc.bias", lambda x: x.astype(np.int32), "itm_score.fc.bias (of type int32"),
    "wrong width": (
        "cross_modal_text_transform.weight",
        lambda x: x[:, :24].copy(),
        "cross_modal_text_transform.weight",
    ),
    "wrong vocabulary": ("mlm_score.decoder.weight", lambda x: x[:150].copy(), "mlm_score.decoder.weight is (150, 32)"),
    "one-dimensional": (WORDS, lambda x: x.reshape(-1), WORDS),
    "no rows": (WORDS, lambda x: x[:0].copy(), WORDS),
    "no square": ("vision_transformer.visual.positional_embedding", lambda x: x[:-1].copy(), "positional_embedding"),
}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("kind", DAMAGED)
def test_weights_that_cannot_be_used_name_their_key(kind: str, tmp_path: Path) -> None:
    name, change, expected = DAMAGED[kind]
    save_file(damage(name, change), tmp_path / "in.safetensors")
    assert expected in fails([str(tmp_path / "in.safetensors"), str(tmp_path / "out"), *HEADS], tmp_path)


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    whole = (GOLDEN / "tiny_image.safetensors").read_bytes()
    for name, content in {
        "truncated.safetensors": whole[:-100],
        "page.ckpt": b"<html>login</html>",
        "empty.bin": b"",
        "code.pt": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0atouch owned\x85R.",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert name in fails([str(tmp_path / name), str(tmp_path / "out")], tmp_path)
    assert "gone.ckpt" in fails([str(tmp_path / "gone.ckpt"), str(tmp_path / "out")], tmp_path)
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    assert "not a full SCL model" in fails([str(tmp_path / "other.safetensors"), str(tmp_path / "out")], tmp_path)
    assert "--heads" in fails([str(GOLDEN / "tiny_image.safetensors"), str(tmp_path / "out"), "--heads=5"], tmp_path)


def test_an_existing_target_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # empty: nothing is lost
    source = str(GOLDEN / "tiny_image.safetensors")
    main([source, str(tmp_path / "out"), *HEADS])
    (tmp_path / "out/checkpoints/mine.txt").write_text("old")
    assert "--overwrite" in fails([source, str(tmp_path / "out"), *HEADS], tmp_path)
    main([source, str(tmp_path / "out"), "--overwrite", *HEADS])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["checkpoints", "config.json"]
    assert not (tmp_path / "out/checkpoints/mine.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_sources_runs_and_other_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    source = tmp_path / "weights" / "model.safetensors"
    shutil.copy(GOLDEN / "tiny_image.safetensors", source)
    for target in (tmp_path / "weights", tmp_path, source):
        assert "which is read" in fails([str(source), str(target), "--overwrite"], tmp_path)
    main([str(source), str(tmp_path / "run"), *HEADS])
    assert "which is read" in fails([str(tmp_path / "run"), str(tmp_path / "run"), "--overwrite"], tmp_path)
    other = "choose another target"
    assert other in fails([str(tmp_path / "run"), str(tmp_path / "weights"), "--overwrite"], tmp_path)
    (tmp_path / "run" / "metrics.jsonl").touch()  # training has gone on here
    assert other in fails([str(source), str(tmp_path / "run"), "--overwrite", *HEADS], tmp_path)


@pytest.mark.parametrize("option", ["--heads=-2", "--vision_heads=-2", "--image_size=-96", "--frames=-1"])
def test_numbers_below_one_are_refused(option: str, tmp_path: Path) -> None:
    source = str(GOLDEN / "tiny_image.safetensors")
    assert f"{option}: a number from 1 on" in fails([source, str(tmp_path / "out"), *HEADS, option], tmp_path)


def test_options_of_the_other_direction_are_refused(tmp_path: Path) -> None:
    source, run, out = str(GOLDEN / "tiny_image.safetensors"), str(tmp_path / "run"), str(tmp_path / "out")
    assert "have no steps; leave out --step" in fails([source, out, *HEADS, "--step=7"], tmp_path)
    main([source, run, *HEADS])
    expected = "a run is exported as it is; leave out --heads, --image_size"
    assert expected in fails([run, out, "--heads=4", "--image_size=96"], tmp_path)


def test_no_disk_space_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = [str(GOLDEN / "tiny_image.safetensors"), str(tmp_path / "out"), *HEADS]
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "disk_usage", lambda _: full)
        assert "the disk has" in fails(source, tmp_path)

    def stop(folder: Path, flat: dict) -> None:
        write_parameters(folder, flat)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scl_jax.convert.to_flax.write_parameters", stop)
    assert "No space left on device" in fails(source, tmp_path)


def test_a_run_without_checkpoint_config_or_step_is_named(tmp_path: Path) -> None:
    main([str(GOLDEN / "tiny_image.safetensors"), str(tmp_path / "run"), *HEADS])
    assert "of step 7; it holds the steps 0" in fails(
        [str(tmp_path / "run"), str(tmp_path / "o"), "--step=7"], tmp_path
    )
    (tmp_path / "run/config.json").unlink()
    assert "config.json is missing" in fails([str(tmp_path / "run"), str(tmp_path / "o")], tmp_path)


def test_names_go_to_and_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub = tmp_path / "hub"

    class Api:
        def repo_exists(self, name: str) -> bool:
            return (hub / name).exists()

        def create_repo(self, name: str, exist_ok: bool) -> None:
            (hub / name).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(hub / name))
    main([str(GOLDEN / "tiny_image.safetensors"), str(tmp_path / "run"), *HEADS])
    main([str(tmp_path / "run"), "hub:me/model"])
    assert "exists on the hub" in fails([str(tmp_path / "run"), "hub:me/model"], tmp_path)
    main(["hub:me/model", str(tmp_path / "again")])
    before, after = (checkpoints.checksum(read_parameters(tmp_path / name)[0]) for name in ("run", "again"))
    assert before == after
    assert json.loads((hub / "me/model/config.json").read_text())["heads"] == 4


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    class Api:
        def repo_exists(self, name: str) -> bool:
            raise HfHubHTTPError.__bases__[0]("Name or service not known")  # httpx's, which is no OSError

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(OSError, match="hub:me/model: the hub cannot be reached .Name or service not known"):
        sources.upload(tmp_path, "hub:me/model", overwrite=False)


NAMES = sorted(weights_of("tiny_image"))
SHAPES = st.lists(st.integers(0, 40), max_size=4).map(tuple)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    removed=st.sets(st.sampled_from(NAMES), max_size=3),
    changed=st.dictionaries(st.sampled_from(NAMES), SHAPES, max_size=3),
    added=st.dictionaries(st.text(max_size=12), SHAPES, max_size=2),
)
def test_any_keys_and_shapes_are_converted_or_refused(removed: set, changed: dict, added: dict) -> None:
    whole = weights_of("tiny_image")
    weights = {name: x for name, x in whole.items() if name not in removed}
    weights |= {name: np.zeros(shape, np.float32) for name, shape in (added | changed).items()}
    try:
        flat, _, report = read_model(weights, 4, 4)
    except (ConversionError, ValueError) as error:
        assert len(str(error)) > 20
        return
    assert set(report.mapped) | set(report.dropped) == set(weights)
    assert all(np.asarray(x).size for x in flat.values())
