"""Whole runs over shards with bad records: they train on the others, say which they left out, and continue exactly."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run
from broken_shards import edit_records, remove, spoil_jpeg

from scl_jax.config import ConfigError
from scl_jax.data.builders import open_source
from scl_jax.models import parameters
from scl_jax.session import Session
from scl_jax.training import sharding
from scl_jax.training.checkpoint import abstract_state

IMAGES = "toy_world/images"
BAD = [3, 11, 19, 30, 41]  # of 48 records: a tenth
OPTIONS = {
    "data.videos.share": 0.0,
    "data.bad_records": "skip",
    "data.max_skipped_share": 0.11,
    "train.steps": 4,
    "train.checkpoint_every": 2,
    "evaluate.max_items": 8,
    **{f"objectives.{name}.weight": 0.0 for name in ("global_vision", "global_text", "local_vision", "local_text")},
}
STEPS: dict[str, object] = {}  # of sessions that differ in their data only


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return toy_run.prepare(tmp_path_factory.mktemp("toy_data"))


@pytest.fixture
def broken(prepared, tmp_path) -> Path:
    folder = shutil.copytree(prepared, tmp_path / "broken")
    edit_records(folder, IMAGES, dict.fromkeys(BAD, spoil_jpeg))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One device; sessions share their jitted step and leave out the final report."""
    monkeypatch.setattr(Session, "report", lambda *_: None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    make_mesh, jit_step = sharding.make_mesh, Session.jit_step
    monkeypatch.setattr(sharding, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:1]))

    def shared(self: Session, *arguments):
        return STEPS.setdefault("step", jit_step(self, *arguments))

    monkeypatch.setattr(Session, "jit_step", shared)


def parameters_of(session: Session) -> dict[str, np.ndarray]:
    _, _, state = session.initial_state()
    state, _ = session.checkpoints.restore(abstract_state(state))
    return {path: np.asarray(x) for path, x in parameters.flatten(state.params).items()}


def test_bad_records_are_left_out_as_if_they_had_never_been_written(prepared, broken, tmp_path):
    """The parameters, the losses and the order of a run on the clean nine tenths."""
    clean = shutil.copytree(prepared, tmp_path / "clean")
    edit_records(clean, IMAGES, dict.fromkeys(BAD, remove))
    expected = Session(toy_run.config(clean, **OPTIONS), tmp_path / "expected")
    assert expected.train() and (tmp_path / "expected/skipped.jsonl").read_text() == ""

    session = Session(toy_run.config(broken, **OPTIONS), tmp_path / "run")
    assert session.train()
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    ids = [open_source(IMAGES, "train", prepared)[index]["id"] for index in BAD]
    assert [(line["index"], line["id"]) for line in lines] == list(zip(BAD, ids, strict=True))
    assert {(line["stream"], line["dataset"], line["split"]) for line in lines} == {("images", IMAGES, "train")}
    assert all("cannot decode JPEG" in line["reason"] for line in lines)
    assert "train: 5 of 48 records (10.42%) cannot be used and are left out" in session.bad_records.notes[0]
    ours, theirs = parameters_of(session), parameters_of(expected)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    metrics = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("run", "expected")]
    assert metrics[0] == metrics[1]

    # repaired shards would be another order of examples: the run does not go on with them
    shutil.copytree(prepared, broken, dirs_exist_ok=True)
    continued = toy_run.config(broken, **OPTIONS | {"train.steps": 4, "train.checkpoint_every": 1})
    with pytest.raises(ConfigError, match="left 5 records out, now they are 0 .*images, toy_world/images, 3.*repaired"):
        Session(continued, tmp_path / "run").train()


def test_too_many_bad_records_are_an_error_before_training(broken, tmp_path):
    message = r"(?s)5 of 48 .*cannot be used, more than data.max_skipped_share 0.1:\n  record 3 \(id .*and 4 more"
    with pytest.raises(ConfigError, match=message):
        Session(toy_run.config(broken, **OPTIONS | {"data.max_skipped_share": 0.1}), tmp_path / "run").train()
    assert not (tmp_path / "run/checkpoints").exists() or not any((tmp_path / "run/checkpoints").iterdir())


def test_an_epoch_is_that_of_the_good_records(broken, tmp_path):
    session = Session(toy_run.config(broken, **OPTIONS | {"train.epochs": 4}), tmp_path / "run")
    assert session.config.train.steps == 11  # 4 · 43 / 16, rounded up; of all 48 they were 12


@pytest.mark.slow
def test_a_run_may_go_on_without_a_record_that_stopped_it(prepared, tmp_path):
    """With `fail` a run stops at the record by its name; `skip` continues, and says that the order is another one."""
    options = OPTIONS | {"data.bad_records": "fail", "train.checkpoint_every": 1}
    broken = shutil.copytree(prepared, tmp_path / "data")
    batches = iter(Session(toy_run.config(broken, **options), tmp_path / "look").training_data())
    third = [next(batches)["item_id"] for _ in range(3)][-1]
    edit_records(broken, IMAGES, {int(third[0]): spoil_jpeg})
    session = Session(toy_run.config(broken, **options), tmp_path / "run")
    with pytest.raises(ValueError, match=rf"split train, record {third[0]} \(id .*cannot decode JPEG"):
        session.train()
    session.checkpoints.wait()
    session = Session(toy_run.config(broken, **options | {"data.bad_records": "skip"}), tmp_path / "run")
    assert session.checkpoints.latest() in (1, 2) and session.train()
    assert "data.bad_records was fail, now skip: another order of examples" in session.bad_records.notes[-1]


@pytest.mark.slow
def test_two_processes_leave_out_the_same_records_as_one(broken, tmp_path):
    options = [f"--config.{name}={value}" for name, value in OPTIONS.items()]

    def run(name: str, count: int) -> Path:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        together = [f"--coordinator={address}", f"--processes={count}"] if count > 1 else []
        own = [[*together, f"--process={index}"] if together else [] for index in range(count)]
        runs = [toy_run.run_main(broken, tmp_path / name, 4 // count, *options, *arguments) for arguments in own]
        said = [run.communicate(timeout=600)[0] for run in runs]
        assert [run.returncode for run in runs] == [0] * count, said
        return tmp_path / name

    for file in broken.rglob("screened.*"):
        file.unlink()
    together = run("together", 2)
    for file in broken.rglob("screened.*"):
        file.unlink()
    alone = run("alone", 1)
    assert (together / "skipped.jsonl").read_text() == (alone / "skipped.jsonl").read_text()
    assert (alone / "skipped.jsonl").read_text().count("\n") == len(BAD)
    losses = [
        [json.loads(line)["loss/images/total"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (together, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4
