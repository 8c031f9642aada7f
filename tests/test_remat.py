"""`model.remat=auto` takes the policy that computes least again and fits the memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import toy_run

from scl_jax import build, compilation_cache, compile_tpu, main, remat, session
from scl_jax.config import finalize
from scl_jax.objectives.views import OBJECTIVES
from scl_jax.session import Session
from scl_jax.training import memory, sharding

GIB = 2**30
LAYERS = {f"model.{part}.layers": 3 for part in ("vision", "text", "fusion")}
FEW = LAYERS | {f"objectives.{name}.weight": 0.0 for name in OBJECTIVES if name != "contrastive"}  # compiles soonest


def planned(**changes):
    """(config, task, mesh) of the toy run with one objective."""
    config = finalize(toy_run.config(Path("nowhere"), **FEW | changes), 512)
    return config, build.task(config, 512, 511), sharding.make_mesh(**config.mesh)


def sizes(needs: dict[str, float], monkeypatch) -> None:
    """Makes the steps of images need so much by policy, those of clips a tenth of it."""

    def needed(config, task, stream, mesh):
        return needs[config.model.remat] / (1 if stream == "images" else 10), "planned"

    monkeypatch.setattr(remat, "needed", needed)


def test_each_policy_needs_less_than_the_one_before():
    config, task, mesh = planned(**{"objectives.matching.weight": 1.0})  # which has fused layers, too
    none, dots, full = (
        remat.least(remat.with_policy(config, policy), task, "videos", mesh) for policy in remat.POLICIES
    )
    assert none > 1.5 * dots > 1.5 * full > 0


def test_what_is_needed_is_that_of_a_micro_batch():
    config, task, mesh = planned()
    whole = remat.least(config, task, "images", mesh)
    config.train.accumulate = 2
    assert whole / 2 < remat.least(config, task, "images", mesh) < 0.7 * whole  # weights stay as they are


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(100 * GIB, "none"), (99 * GIB, "dots"), (50 * GIB, "dots"), (20 * GIB, "full"), (1, "full")],
)
def test_the_first_that_fits_with_room_is_taken(memory, expected, monkeypatch):
    sizes({"none": 90 * GIB, "dots": 30 * GIB}, monkeypatch)  # the last is not compiled: nothing needs less
    said: list[str] = []
    config, task, mesh = planned()
    found = remat.resolve(config, task, ["images", "videos"], mesh, said.append, memory)
    assert found.model.remat == expected and config.model.remat == "auto"
    assert said[-1].startswith(f"model.remat={expected}:") and said[-1].endswith("taken")
    if memory == 50 * GIB:
        assert said[0] == "model.remat=none: 90.0 of 50.0 GiB planned (images): too much"


def test_all_streams_must_fit(monkeypatch):
    sizes({"none": 90 * GIB, "dots": 30 * GIB}, monkeypatch)
    config, task, mesh = planned()
    assert remat.resolve(config, task, ["videos"], mesh, print, 20 * GIB).model.remat == "none"
    assert remat.resolve(config, task, ["videos", "images"], mesh, print, 40 * GIB).model.remat == "dots"


@pytest.mark.parametrize(
    ("bounds", "plans", "compiled"),
    [((1, 1), (90, 1), ["images"]), ((1, 60), (1, 1), []), ((1, 1), (1, 90), ["images", "videos"])],
    ids=["first too much", "second cannot fit", "second too much"],
)
def test_nothing_more_is_compiled_of_a_policy_that_does_not_fit(bounds, plans, compiled, monkeypatch):
    streams, seen = ["images", "videos"], []

    def needed(config, task, stream, mesh):
        seen.append(stream)
        return plans[streams.index(stream)] * GIB, "planned"

    monkeypatch.setattr(remat, "least", lambda config, task, stream, mesh: bounds[streams.index(stream)] * GIB)
    monkeypatch.setattr(remat, "needed", needed)
    config, task, mesh = planned()
    assert remat.most_needed(config, task, streams, mesh, 50 * GIB)[0] > 50 * GIB and seen == compiled


def test_a_policy_that_is_named_stays_and_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(build, "planned_step", None)
    config, task, mesh = planned(**{"model.remat": "dots"})
    assert remat.resolve(config, task, ["images"], mesh, memory=1).model.remat == "dots"


def test_where_devices_do_not_say_what_they_have_nothing_is_computed_again(monkeypatch):
    monkeypatch.setattr(build, "planned_step", None)
    config, task, mesh = planned()
    assert memory.device_memory() is None  # on a CPU
    assert remat.resolve(config, task, ["images"], mesh).model.remat == "none"


def test_what_cannot_fit_is_not_compiled(monkeypatch):
    monkeypatch.setattr(build, "planned_step", None)
    said: list[str] = []
    config, task, mesh = planned()
    assert remat.resolve(config, task, ["images"], mesh, said.append, 2**10).model.remat == "full"
    assert [line.partition(":")[0] for line in said] == ["model.remat=none", "model.remat=dots", "model.remat=full"]
    assert "GiB at least (images): too much" in said[0]


class Refused:
    """A step that the compiler refuses with a message."""

    def __init__(self, message: str):
        self.message = message

    def lower(self, *_):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_refusal_for_memory_leads_on_and_another_one_does_not(monkeypatch):
    config, task, mesh = planned()
    said: list[str] = []
    monkeypatch.setattr(build, "planned_step", lambda *_: (Refused("RESOURCE_EXHAUSTED: Ran out of memory"), ()))
    assert remat.resolve(config, task, ["images"], mesh, said.append, GIB).model.remat == "full"
    assert said[0] == "model.remat=none: refused by the compiler (images): too much"
    monkeypatch.setattr(build, "planned_step", lambda *_: (Refused("INTERNAL: a mistake"), ()))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        remat.resolve(config, task, ["images"], mesh, said.append, GIB)


def test_processes_agree_on_the_policy_that_needs_least(monkeypatch):
    assert remat.agreed("none", 1) == "none"
    monkeypatch.setattr(remat, "share", lambda text, timeout: [text, "dots", "none"])
    assert [remat.agreed(policy, 1) for policy in remat.POLICIES] == ["dots", "dots", "full"]


def test_the_tpu_compiler_is_spared_what_cannot_fit(monkeypatch):
    config, task, mesh = planned()
    arguments = build.planned_step(config, task, "images", mesh)[1]
    monkeypatch.setattr(build, "planned_step", lambda *_: (Refused("INTERNAL: compiled"), arguments))
    monkeypatch.setattr(compile_tpu, "count_flops", lambda *_, **__: 1.0)
    monkeypatch.setitem(compile_tpu.HBM, "v5e", 2**-20)
    (*_, last) = compile_tpu.find(config, "images", list(mesh.devices.flat), "v5e:2x4", 4)
    assert last.remat == "full" and not last.fits
    assert last.problem.startswith("not compiled: at least ")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return toy_run.prepare(tmp_path_factory.mktemp("data"))


def test_a_run_chooses_says_and_records_its_policy(data_dir, tmp_path, monkeypatch, capsys):
    """The memory lies between what two policies plan, so that the compiler's plans decide."""
    config = toy_run.config(data_dir, **FEW | {"data.videos.share": 0.0, "log.console": True})
    run = Session(config, tmp_path)
    plans = {}
    for policy in remat.POLICIES[:2]:
        tried = remat.with_policy(run.config, policy)
        plans[policy], how = remat.needed(tried, run.task, "images", run.mesh)
        assert how == "planned"
    assert plans["none"] > 1.05 * plans["dots"]
    limit = int((plans["none"] + plans["dots"]) / 2 / remat.ROOM)
    monkeypatch.setattr(remat, "device_memory", lambda: limit)
    monkeypatch.setattr(session, "train", lambda task, step, state, *_: (state, False))  # a signal at once
    assert not run.train()
    said = capsys.readouterr().out
    assert "model.remat=none:" in said and "model.remat=dots:" in said and "planned (images): taken" in said
    assert json.loads((tmp_path / "config.json").read_text())["model"]["remat"] == "dots"
    assert run.initial_state()[0] != Session(config, tmp_path).initial_state()[0]  # graphs hold the policy


def test_a_finished_run_plans_nothing(data_dir, tmp_path, monkeypatch):
    """Unless its last checkpoint is damaged, so that steps are left after all."""
    config = toy_run.config(data_dir, **FEW | {"data.videos.share": 0.0})
    run = Session(config, tmp_path)
    _, _, state = run.initial_state()
    with run.open_log(0) as log:
        log.save_config(remat.with_policy(run.config, "dots"))
    progress = {"data": iter(run.training_data()).get_state(), "window": {}}
    for step in (4, 6):
        run.checkpoints.save(step, dataclasses.replace(state, step=jnp.asarray(step, jnp.int32)), progress)
    run.checkpoints.close()
    resolved = []
    monkeypatch.setattr(remat, "resolve", lambda config, *_: resolved.append(1) or remat.with_policy(config, "full"))
    monkeypatch.setattr(session, "train", lambda task, step, state, *_: (state, int(state.step) == 6))
    monkeypatch.setattr(Session, "report", lambda *_: None)

    def policy():
        return json.loads((tmp_path / "config.json").read_text())["model"]["remat"]

    assert Session(config, tmp_path).train() and not resolved and policy() == "dots"
    shutil.rmtree(tmp_path / "checkpoints/6/state/d")
    assert not Session(config, tmp_path).train() and resolved and policy() == "full"


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "INTERNAL: Error dispatching computation"])
def test_a_device_that_is_too_small_ends_a_run_with_what_to_do(code, monkeypatch, tmp_path):
    """As XLA says it on a GPU and on a CPU; other errors of the device keep their traceback."""
    said = [f"{code}: Out of memory while trying to allocate 12345678 bytes.\nBufferAssignment: …"]

    def begin(*_):
        raise jax.errors.JaxRuntimeError(said[0])

    for name, value in {"_CONFIG": toy_run.config(tmp_path), "_WORKDIR": tmp_path, "_MODE": "train"}.items():
        monkeypatch.setattr(main, name, SimpleNamespace(value=value))
    monkeypatch.setattr(session, "Session", begin)
    monkeypatch.setattr(compilation_cache, "keep_compiled", lambda _: None)
    monkeypatch.setattr("scl_jax.host_memory.keep_freed", lambda: False)  # of all tests of this process
    with pytest.raises(
        SystemExit, match="too small .*12345678 bytes.*model.remat=full .*train.accumulate .in a new --work"
    ):
        main._run()
    said[0] = "INTERNAL: a mistake"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        main._run()
