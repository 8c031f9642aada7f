"""Faults in a run: what it says, and that nothing is lost. The harnesses in tests/faults do the same at length."""

from __future__ import annotations

import errno
import json
import math
import os
import pwd
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run
from test_session import Devices

from scl_jax import main
from scl_jax.compilation_cache import keep_compiled
from scl_jax.config import ConfigError, config_of_run, default_config
from scl_jax.replay import on_devices_here, replay
from scl_jax.session import Session
from scl_jax.training.checkpoint import CheckpointError, Checkpoints
from scl_jax.training.nonfinite import SKIPPED, NonFiniteError, records
from scl_jax.training.workdir import WorkdirError, held, located
from tests.faults import runs
from tests.faults.poison import poison

# two objectives on images: a step that is compiled in seconds
FEW = {f"objectives.{name}.weight": 0.0 for name in ("masked_language", "global_vision", "global_text")}
FEW |= {"objectives.local_vision.weight": 0.0, "objectives.local_text.weight": 0.0, "data.videos.share": 0.0}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return toy_run.prepare(tmp_path_factory.mktemp("toy_data"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    Devices(monkeypatch, 1)


def session(data_dir: Path, workdir: Path, **changes) -> Session:
    return Session(toy_run.config(data_dir, **(FEW | changes)), workdir)


def metrics_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def parameters_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    return {path: x for path, x in runs.arrays(workdir, step).items() if path.startswith("['params']")}


# ---- numbers ----


SAVED = {"train.steps": 8, "train.checkpoint_every": 1, "train.keep_latest": 8, "train.max_nonfinite_in_row": 3}


@pytest.mark.slow
def test_injected_nans_are_skipped_counted_and_kept_and_a_row_of_them_ends_the_run(data_dir, tmp_path):
    """NaN at steps 2, 5, 6 and 7: the parameters stand still there, the third in a row is the last."""
    run = session(data_dir, tmp_path, **SAVED)
    poison(run, [2, 5, 6, 7])
    with pytest.raises(
        NonFiniteError, match="3 updates in a row, up to step 7, were skipped: the loss of matching"
    ) as error:
        run.train()
    assert error.value.objectives == ("matching",)
    lines = metrics_of(tmp_path)
    assert [line[SKIPPED] for line in lines] == [0, 1, 0, 0, 1, 1, 1]
    assert all(math.isfinite(x) for line in lines for x in line.values())
    assert records(tmp_path / "nonfinite") == [2, 5, 6, 7]
    assert run.checkpoints.latest() == 6  # sound: nothing of the skipped steps is in it
    before, bad, after, end = (parameters_of(tmp_path, step) for step in (1, 2, 3, 6))
    for path, x in before.items():
        np.testing.assert_array_equal(x, bad[path], err_msg=path)
    assert any((x != after[path]).any() for path, x in bad.items())
    assert all(np.isfinite(x).all() for x in end.values())


@pytest.mark.slow
def test_a_step_is_replayed_with_its_batch_and_masks(data_dir, tmp_path, capsys):
    run = session(data_dir, tmp_path, **SAVED)
    poison(run, [3, 6])
    assert run.train()
    again = Session(config_of_run(tmp_path), tmp_path, "replay")
    poison(again, [3, 6])
    findings, lines = replay(again, 3)
    assert {f.objective: f.finite for f in findings} == {"contrastive": True, "matching": False}
    (matching,) = (f for f in findings if f.objective == "matching")
    assert matching.first.startswith("NaN from mul at tests/faults/poison.py:") and matching.parameters
    assert "the batch is the one of the run's record" in lines
    assert "every parameter is finite" in lines
    assert any("row 0: toy_world/images, split train, record" in line for line in lines)
    assert "from checkpoint 2 to step 3" in capsys.readouterr().out

    findings, lines = replay(again, 5)  # any other step
    expected = metrics_of(tmp_path)[4]
    for finding in findings:
        assert finding.loss == pytest.approx(expected[f"loss/images/{finding.objective}"], rel=1e-5)
    assert any("every loss and every gradient is finite" in line for line in lines)


def test_a_run_of_many_devices_is_replayed_on_those_that_are_here(capsys):
    config = default_config()
    config.mesh.update(data=2, fsdp=4)
    config.model.attention = "fused"  # of a GPU
    assert on_devices_here(config).mesh.to_dict() == {"data": -1, "fsdp": 1, "tensor": 1}
    assert config.model.attention == "auto"
    assert "the run's mesh does not fit 1 device(s)" in capsys.readouterr().out
    assert on_devices_here(config).mesh.data == -1 and not capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_ends_because_of_a_gradient_names_its_objective(data_dir, tmp_path):
    run = session(data_dir, tmp_path, **SAVED)
    poison(run, [4, 5, 6], kind="gradient")
    with pytest.raises(NonFiniteError, match="up to step 6, were skipped: the gradient, though every loss is") as error:
        run.train()
    assert "The gradient that is not finite is that of matching, first NaN from" in str(error.value)


# ---- work directory and checkpoints ----


def test_where_there_is_no_home_nothing_is_kept_there(monkeypatch):
    """As for a user of a container who has a number only."""

    def nobody(number):
        raise KeyError(number)

    told: dict[str, object] = {}
    for variable in ("HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    keep_compiled("~/.cache/scl_jax/xla")
    assert "jax_compilation_cache_dir" not in told
    keep_compiled("/tmp/xla")
    assert told["jax_compilation_cache_dir"] == "/tmp/xla"
    assert located("~nobody_of_this_name/run") == Path("~nobody_of_this_name/run")


def test_a_work_directory_in_use_is_refused(data_dir, tmp_path):
    run = session(data_dir, tmp_path)
    holder = "import sys, time; from pathlib import Path; from scl_jax.training.workdir import held\n"
    holder += f"with held(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(600)\n"
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, cwd=toy_run.ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    try:
        for attempt in (run.train, run.evaluate):
            with pytest.raises(
                WorkdirError, match=f"is in use by process {process.pid} on .*: wait for it, stop it, or"
            ):
                attempt()
    finally:
        process.kill()
        process.wait()
    with held(tmp_path):  # a dead process holds nothing
        pass
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_work_directory_that_cannot_be_written_is_said_before_anything_is_compiled(
    data_dir, tmp_path, monkeypatch, error
):
    """As root nothing is forbidden, so the system's answer is put in its mouth; the harness drops root's rights."""

    def refuse(self, *_, **__):
        raise OSError(error, os.strerror(error), str(self))

    run = session(data_dir, tmp_path / "work")
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Session, "initial_state", lambda *_: pytest.fail("compiled"))
    with pytest.raises(WorkdirError, match=f"cannot write to the work directory .*{os.strerror(error)}.* --workdir"):
        run.train()


@pytest.fixture(scope="module")
def three_checkpoints(data_dir, tmp_path_factory) -> Path:
    """A finished run of 6 steps that kept steps 2, 4, 6."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        Devices(patch, 1)
        assert session(data_dir, workdir, **KEEP).train()
    return workdir


KEEP = {"train.keep_latest": 3}


@pytest.mark.parametrize("named", ["gs://bucket/run", "s3://b", Path("gs://bucket/run")])
def test_a_work_directory_that_is_an_address_is_refused(named):
    with pytest.raises(WorkdirError, match="is an address: name a folder"):
        located(named)


def test_a_work_directory_may_begin_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("~/runs/a:b") == tmp_path / "runs/a:b" and located("runs/a") == Path("runs/a")


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_continued(
    data_dir, tmp_path, three_checkpoints, capsys
):
    """All ways of damage: tests/training/test_checkpoint.py."""
    workdir = tmp_path / "run"
    shutil.copytree(three_checkpoints, workdir)
    data = max((workdir / "checkpoints/6/state").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    again = session(data_dir, workdir, **{**KEEP, "log.console": True})
    assert again.train()
    said = capsys.readouterr().out.replace("\n", " ")
    assert "checkpoint 6 cannot be read" in said and "set aside in" in said and "continuing from step 4" in said
    assert (workdir / "broken_checkpoints/6").is_dir() and again.checkpoints.latest() == 6
    assert (workdir / "metrics.jsonl").read_bytes() == (three_checkpoints / "metrics.jsonl").read_bytes()
    assert runs.differing(workdir, three_checkpoints, 6) == []


def test_a_full_disk_during_a_save_is_said_and_harms_no_earlier_checkpoint(data_dir, tmp_path, monkeypatch):
    run = session(data_dir, tmp_path)
    real = Checkpoints.save

    def save(self, step, *rest):
        if step == 4:
            self.wait()
            monkeypatch.setattr(type(self._manager), "save", full)
        return real(self, step, *rest)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device [OS error 28]")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(
            CheckpointError, match="the disk is full; the newest whole checkpoint is step 2. The same com"
        ):
            run.train()
    assert runs.saved(tmp_path) == [2]


def test_a_full_disk_is_said_whatever_is_written(monkeypatch):
    class Full:
        def __init__(self, *_): ...

        def train(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr("scl_jax.session.Session", Full)
    monkeypatch.setattr("scl_jax.compilation_cache.keep_compiled", lambda _: None)
    monkeypatch.setattr("scl_jax.host_memory.keep_freed", lambda: False)  # of all tests of this process
    monkeypatch.setattr(main, "_CONFIG", type("Flag", (), {"value": default_config()}))
    monkeypatch.setattr(main, "_WORKDIR", type("Flag", (), {"value": "x"}))
    monkeypatch.setattr(main, "_MODE", type("Flag", (), {"value": "train"}))
    with pytest.raises(SystemExit, match="the disk is full: make room; the same command continues from the newest"):
        main._run()


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(data_dir, tmp_path, three_checkpoints, monkeypatch):
    """Years forth and back at every look at it: the same metrics, checkpoints and parameters."""
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, 4e9))
    run = session(data_dir, tmp_path / "run", **KEEP)
    assert run.train()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (three_checkpoints / "metrics.jsonl").read_bytes()
    names = [
        sorted(path.name for path in (at / "checkpoints").iterdir()) for at in (tmp_path / "run", three_checkpoints)
    ]
    assert names[0] == names[1]


# ---- configuration ----


def test_everything_that_is_missing_or_wrong_stands_in_one_report(data_dir, tmp_path):
    changes = {
        "data.images.datasets": ("toy_world/images", "toy_world/pictures"),
        "evaluate.final_split": "tset",
        "init.text": "weights/nowhere/roberta",
        "log.wandb_project": "none",
        "train.steps": 0,
        "optimizer.b2": 1.5,
    }
    with pytest.raises(ConfigError) as error:
        session(data_dir, tmp_path / "work", **changes)
    said = str(error.value)
    for part in (
        "toy_world/pictures",
        "'tset'",
        "init.text: weights/nowhere/roberta",
        "wandb",
        "train.steps is 0",
        "b2",
    ):
        assert part in said, part
    assert not (tmp_path / "work").exists()
