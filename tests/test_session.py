"""A whole run: it trains, evaluates, continues exactly, and is the same on any mesh."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import time
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run

from scl_jax.config import ConfigError
from scl_jax.data.tokens import load_run_tokenizer
from scl_jax.models import parameters
from scl_jax.session import Session
from scl_jax.training import sharding
from scl_jax.training.checkpoint import Checkpoints, abstract_state
from scl_jax.training.records import write_json


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    return toy_run.prepare(tmp_path_factory.mktemp("toy_data"))


ALONE = {"objectives.group_size": 4}  # of runs on one device: one program, compiled once


class Devices:
    """Makes a session use the first `count` of the virtual devices, and leave out the final report unless asked to."""

    def __init__(self, monkeypatch, count: int, report: bool = False):
        if not report:
            monkeypatch.setattr(Session, "report", lambda *_: None)
        devices = jax.devices()[:count]
        monkeypatch.setattr(jax, "device_count", lambda: count)
        make_mesh = sharding.make_mesh
        monkeypatch.setattr(sharding, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=devices))


def metrics_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def parameters_of(session: Session) -> dict[str, np.ndarray]:
    _, _, state = session.initial_state()
    state, _ = session.checkpoints.restore(abstract_state(state))
    return {path: np.asarray(x) for path, x in parameters.flatten(state.params).items()}


STEPS: dict[str, object] = {}


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Sessions of one config on the same devices share their jitted step: a restart need not compile again."""
    jit_step = Session.jit_step

    def shared(self: Session, *arguments):
        name = f"{self.mesh.shape} {self.mesh.devices.size} {self.config.to_json_best_effort()}"
        return STEPS.setdefault(name, jit_step(self, *arguments))

    monkeypatch.setattr(Session, "jit_step", shared)


@pytest.mark.parametrize(
    ("devices", "accumulate"),
    [(1, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 2), (8, 1), (1, 2)))],
)
def test_an_interrupted_run_is_bit_identical_to_an_undisturbed_one(
    data_dir, tmp_path, monkeypatch, devices, accumulate
):
    """Stopped with more steps logged than saved, as by SIGKILL; dropout on, all losses; one device: both streams."""
    Devices(monkeypatch, devices)
    options = ALONE | {"train.accumulate": accumulate}
    if devices == 8:
        options |= {"objectives.group_size": 2, "data.videos.share": 0.0}
    if accumulate == 2:
        options["data.images.batch_size"] = options["data.videos.batch_size"] = 32
    undisturbed = Session(toy_run.config(data_dir, **options), tmp_path / "undisturbed")
    assert undisturbed.train()

    config = toy_run.config(data_dir, **options)
    killed = Session(config, tmp_path / "killed")
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: save(self, step, *rest) if step < 5 else die())
    with pytest.raises(KilledError):
        killed.train()
    killed.checkpoints.wait()
    monkeypatch.setattr(Checkpoints, "save", save)
    assert [line["step"] for line in metrics_of(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]

    restarted = Session(config, tmp_path / "killed")
    shapes = jax.tree.leaves(restarted.initial_state()[2])
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in shapes)  # no second state beside the restored one
    assert restarted.train()
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "undisturbed/metrics.jsonl").read_bytes()
    for (path, x), y in zip(parameters_of(undisturbed).items(), parameters_of(restarted).values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


class KilledError(Exception):
    """Stands for SIGKILL."""


def die() -> None:
    raise KilledError


def test_a_run_leaves_what_others_rely_on(data_dir, tmp_path, monkeypatch):
    Devices(monkeypatch, 1, report=True)
    session = Session(toy_run.config(data_dir, **ALONE), tmp_path)
    assert session.train()
    results = json.loads((tmp_path / "results.json").read_text())
    for name in (
        "retrieval/text_to_image/recall@1",
        "retrieval/video/text_to_video/recall@1",
        "retrieval/contrastive/image_to_text/recall@10",
        "matching/accuracy",
        "masked_language/accuracy",
        "matching/video/accuracy",
    ):
        assert 0 <= results[name] <= 1
    lines = metrics_of(tmp_path)
    losses = {name.split("/")[2] for line in lines for name in line if name.startswith("loss/")}
    assert losses == {
        *("contrastive", "matching", "masked_language", "global_vision", "global_text"),
        *("local_vision", "local_text", "total"),
    }
    assert all(np.isfinite(value) for line in lines for value in line.values())
    for name in ("config.json", "loss_curves.png", "retrieval_images.png", "retrieval_videos.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert session.checkpoints.latest() == 6
    own = load_run_tokenizer(tmp_path, "a path that no longer holds")
    encoded = (tokenizer.encode("a red star", 12)["token_ids"] for tokenizer in (own, session.tokenizer))
    np.testing.assert_array_equal(*encoded)


def test_another_config_in_the_same_work_directory_is_refused(data_dir, tmp_path, monkeypatch):
    Devices(monkeypatch, 1)
    begun = Session(toy_run.config(data_dir, **{"train.steps": 1}), tmp_path)
    write_json(tmp_path / "config.json", begun.config.to_dict())
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"model\.dropout: 0\.1 → 0\.2"):
        Session(toy_run.config(data_dir, **{"train.steps": 1, "model.dropout": 0.2}), tmp_path)
    Session(toy_run.config(data_dir, **{"train.steps": 1, "log.every": 7}), tmp_path)  # does not matter


def test_checkpoints_whose_config_is_lost_are_refused_and_stay(data_dir, tmp_path):
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds checkpoints, but no config\.json says of which config: put it back"):
        Session(toy_run.config(data_dir, **{"train.steps": 1, "mesh.data": -1}), tmp_path)
    assert (tmp_path / "checkpoints/1").exists()


def test_a_run_begun_before_an_option_existed_can_be_continued(data_dir, tmp_path):
    changes = {"train.steps": 1, "mesh.data": -1}
    before = json.loads(json.dumps(Session(toy_run.config(data_dir, **changes), tmp_path).config.to_dict()))
    del before["optimizer"]["clip_norm"], before["reference_behaviour"]
    write_json(tmp_path / "config.json", before)
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    Session(toy_run.config(data_dir, **changes), tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.clip_norm: 0\.0 → 1\.0"):
        Session(toy_run.config(data_dir, **changes, **{"optimizer.clip_norm": 1.0}), tmp_path)


@pytest.fixture(scope="module")
def other_tokenizer(data_dir, tmp_path_factory) -> Path:
    """Of the size of that of the data, with two words swapped."""
    folder = shutil.copytree(data_dir / "tokenizer", tmp_path_factory.mktemp("other") / "tokenizer")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_begun_run_keeps_its_tokenizer(data_dir, other_tokenizer, tmp_path, mode):
    changes = {"train.steps": 1, "mesh.data": -1}
    begun = Session(toy_run.config(data_dir, **changes), tmp_path)
    write_json(tmp_path / "config.json", begun.config.to_dict())
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    begun.tokenizer.save(tmp_path / "tokenizer")
    Session(toy_run.config(data_dir, **changes), tmp_path, mode)
    own = str(tmp_path / "tokenizer")
    Session(toy_run.config(data_dir, **changes, **{"data.tokenizer": own}), tmp_path, mode)  # the same by content
    changes["data.tokenizer"] = str(other_tokenizer)
    with pytest.raises(ConfigError, match=f"is another tokenizer than .* --config.data.tokenizer={own}"):
        Session(toy_run.config(data_dir, **changes), tmp_path, mode)


def test_the_tokenizer_is_that_of_the_checkpoint_it_starts_from(data_dir, other_tokenizer, tmp_path):
    start = tmp_path / "start"
    (start / "checkpoints/1").mkdir(parents=True)
    changes = {"mesh.data": -1, "init.checkpoint": str(start)}
    Session(toy_run.config(data_dir, **changes), tmp_path / "run")  # it has none
    shutil.copytree(other_tokenizer, start / "tokenizer")
    with pytest.raises(ConfigError, match=f"data.tokenizer: .* --config.data.tokenizer={start}/tokenizer"):
        Session(toy_run.config(data_dir, **changes), tmp_path / "run")
    changes["data.tokenizer"] = str(start / "tokenizer")
    Session(toy_run.config(data_dir, **changes), tmp_path / "run")


@pytest.mark.parametrize("bad_records", ["fail", "skip"])
def test_an_evaluation_needs_no_training_shards(data_dir, tmp_path, bad_records):
    """Not even where the steps of the run were counted by them."""
    changes = {"train.epochs": 2, "data.videos.share": 0.0, "mesh.data": -1, "data.bad_records": bad_records}
    run = tmp_path / "run"
    begun = Session(toy_run.config(data_dir, **changes), run)
    (run / "checkpoints/1").mkdir(parents=True)
    write_json(run / "config.json", begun.config.to_dict())
    elsewhere = shutil.copytree(data_dir, tmp_path / "data")
    for shard in elsewhere.glob("toy_world/*/*/*-train.*"):
        shard.unlink()
    evaluated = Session(toy_run.config(elsewhere, **changes), run, "evaluate")
    assert evaluated.config.train.steps == 6  # two epochs of 48 images in batches of 16
    Session(toy_run.config(elsewhere, **changes), tmp_path / "another", "evaluate")
    with pytest.raises(ConfigError, match="train"):
        Session(toy_run.config(elsewhere, **changes), run)


def test_an_evaluation_of_nothing_makes_no_folder(data_dir, tmp_path):
    session = Session(toy_run.config(data_dir, **{"mesh.data": -1}), tmp_path / "typo", "evaluate")
    said = "typo: give the work directory of a run, or weights by init.checkpoint"
    with pytest.raises(FileNotFoundError, match=said):
        session.evaluate()
    assert not (tmp_path / "typo").exists()
    (tmp_path / "typo").mkdir()  # of a run that has saved nothing yet: said before a network is made
    with pytest.raises(FileNotFoundError, match=said):
        session.evaluate()


def test_a_missing_data_set_of_questions_is_one_problem(data_dir, tmp_path):
    changes = {"task": "vqa", "train.best_metric": "vqa/score", "data.videos.share": 0.0, "mesh.data": -1}
    changes["data.images.datasets"] = ("toy_world/questions",)
    with pytest.raises(ConfigError, match=r"the config has 1 problem\(s\):\n  toy_world/questions"):
        Session(toy_run.config(data_dir, **changes), tmp_path)


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_the_split_that_chooses_a_weight_is_asked_for_before_the_run(data_dir, tmp_path, mode):
    changes = {"evaluate.split": "another", "mesh.data": -1}
    Session(toy_run.config(data_dir, **changes), tmp_path, mode)  # it is not looked at
    with pytest.raises(ConfigError, match="has no split 'another'"):
        Session(toy_run.config(data_dir, **changes, **{"evaluate.matching_weights": (0.0, 1.0)}), tmp_path, mode)


def test_a_save_that_was_killed_is_no_begun_run(data_dir, tmp_path):
    changes = {"train.steps": 1, "mesh.data": -1}
    write_json(tmp_path / "config.json", Session(toy_run.config(data_dir, **changes), tmp_path).config.to_dict())
    (tmp_path / "checkpoints/2.orbax-checkpoint-tmp").mkdir(parents=True)
    Session(toy_run.config(data_dir, **changes, **{"model.dropout": 0.2}), tmp_path)


def losses_on(mesh: dict[str, int], stream: str, data_dir: Path, workdir: Path, monkeypatch) -> list[dict]:
    with monkeypatch.context() as patch:
        Devices(patch, math.prod(mesh.values()))
        changes = {f"mesh.{axis}": size for axis, size in mesh.items()}
        changes[f"data.{'videos' if stream == 'images' else 'images'}.share"] = 0.0
        options = {"train.steps": 5, "train.checkpoint_every": 5, "objectives.group_size": 4, "data.text_length": 16}
        assert Session(toy_run.config(data_dir, **options, **changes), workdir).train()
    return metrics_of(workdir)


@pytest.fixture(scope="module")
def losses_alone(data_dir, tmp_path_factory):
    """Of one device, by stream."""

    @cache
    def losses(stream: str) -> list[dict]:
        with pytest.MonkeyPatch.context() as patch:
            return losses_on({"data": 1}, stream, data_dir, tmp_path_factory.mktemp(stream), patch)

    return losses


DATA, FSDP, TENSOR = {"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("mesh", "stream"),
    [
        pytest.param(TENSOR, "images", id="tensor-images"),
        pytest.param(DATA, "images", id="data-images", marks=pytest.mark.slow),
        pytest.param(FSDP, "images", id="fsdp-images", marks=pytest.mark.slow),
        pytest.param(DATA, "videos", id="data-videos", marks=pytest.mark.slow),
        pytest.param(FSDP, "videos", id="fsdp-videos", marks=pytest.mark.slow),
        pytest.param(TENSOR, "videos", id="tensor-videos", marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_same_losses(losses_alone, data_dir, tmp_path, monkeypatch, mesh, stream):
    """As one device: 5 steps with dropout, to 1e-5."""
    many = losses_on(mesh, stream, data_dir, tmp_path, monkeypatch)
    for expected, line in zip(losses_alone(stream), many, strict=True):
        for key in (key for key in expected if key.startswith("loss/")):
            assert abs(line[key] - expected[key]) <= 1e-5 * max(1, abs(expected[key])), (line["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (1, 2), (8, 1), (8, 2)])
def test_sigkill_at_a_random_moment(data_dir, tmp_path, devices, accumulate):
    """`python -m scl_jax.main` killed with SIGKILL and restarted ends as the undisturbed one: files and parameters."""
    overrides = (
        f"--config.train.accumulate={accumulate}",
        "--config.train.steps=40",
        "--config.objectives.group_size=2",
    )
    overrides += ("--config.data.images.batch_size=32", "--config.data.videos.batch_size=32")
    process = toy_run.run_main(data_dir, tmp_path / "undisturbed", devices, *overrides)
    assert process.wait() == 0, process.stdout.read()

    kill_at = random.Random(devices * 10 + accumulate).randint(5, 35)
    process = toy_run.run_main(data_dir, tmp_path / "killed", devices, *overrides)
    metrics = tmp_path / "killed/metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= kill_at):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process = toy_run.run_main(data_dir, tmp_path / "killed", devices, *overrides)
    assert process.wait() == 0, process.stdout.read()
    runs = [tmp_path / "killed", tmp_path / "undisturbed"]
    first, second = (run.joinpath("metrics.jsonl").read_bytes() for run in runs)
    assert first == second
    first, second = (json.loads(run.joinpath("results.json").read_text()) for run in runs)
    timeless = [{key: value for key, value in x.items() if "seconds" not in key} for x in (first, second)]
    assert timeless[0] == timeless[1]
    checkpoints = [Checkpoints(tmp_path / run / "checkpoints") for run in ("undisturbed", "killed")]
    config = toy_run.config(data_dir)
    _, _, state = Session(config, tmp_path / "fresh").initial_state()
    states = [found.restore(abstract_state(state), 40)[0] for found in checkpoints]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(data_dir, tmp_path):
    process = toy_run.run_main(
        data_dir,
        tmp_path,
        1,
        "--config.train.steps=5000",
        "--config.train.checkpoint_every=5000",
        "--stopped_status=75",
    )
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    saved = Checkpoints(tmp_path / "checkpoints").latest()
    assert saved is not None and saved == metrics_of(tmp_path)[-1]["step"]
