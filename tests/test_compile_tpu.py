"""The step of main is compiled for TPU chips that are not there, and what the compiler says is told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run

from scl_jax import build, compile_tpu, scaling_table
from scl_jax.compile_tpu import Findings, compile_step, describe, find, tpu_devices, with_mesh
from scl_jax.config import ConfigError, finalize
from scl_jax.remat import out_of_memory
from scl_jax.tpu_compiler import roomy_stacks
from scl_jax.training import sharding


def tiny(**changes):
    """The contrastive objective alone on images: the smallest step there is."""
    config = toy_run.config(Path("nowhere"), **changes)
    config.data.videos.share = 0.0
    for name in ("matching", "masked_language", "global_vision", "global_text", "local_vision", "local_text"):
        config.objectives[name].weight = 0.0
    return finalize(config, 512)


def findings(**changes) -> Findings:
    base = Findings(
        config="pretrain_image",
        stream="images",
        topology="v5p:2x2x2",
        chips=8,
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        batch_size=128,
        accumulate=1,
        remat="full",
        fits=True,
        parameters=1_000_000,
        traced_flops=2e12,
        hbm=2**34,
        arguments=2**30,
        temporaries=2**31,
        total=3 * 2**30,
        flops=2.5e12,
        collectives={"all-reduce": (4, 2**24)},
        buffers=[(2**20, "bf16[8,64]", "jit(step)/dot_general")],
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> dict:
    """What `tpu_compiler.py` found, in a process of its own: libtpu is loaded in no other test's."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install -r requirements-dev.txt (Linux on x86-64 only)")
    file = tmp_path_factory.mktemp("compiler") / "facts.json"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, [str(toy_run.ROOT), *sys.path]))}
    command = [sys.executable, "tests/tpu_compiler.py", str(file), "contrastive", "local_vision"]
    done = subprocess.run(command, cwd=toy_run.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


def test_a_small_step_compiles_for_eight_chips_and_no_chip_holds_or_does_it_all(compiler):
    """An objective over the whole batch and one inside groups, on data=2 and fsdp=4."""
    step = compiler["step"]
    told = step["described"]
    assert step["fits"] and step["chips"] == 8 and step["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert step["temporaries"] > 0 and 0 < step["arguments"] < step["total"] < step["hbm"]
    state = 3 * 4 * step["parameters"]  # parameters and two moments
    assert step["arguments"] < state / 2, told  # a fourth of it, and what tiles pad
    assert 0.5 < step["flops"] / step["traced_flops"] < 2, told  # of work, too: replicated it would be eight times
    assert {"all-gather", "all-reduce"} <= step["collectives"].keys(), told
    sent = {kind: size for kind, (_, size) in step["collectives"].items()}
    moved = sent.get("all-to-all", 0) + sent.get("collective-permute", 0)  # the full-size step has none, this one 1.3 %
    assert moved < 0.02 * sum(sent.values()), told
    assert not step["warnings"], told
    assert "fits with remat none" in told


def test_a_batch_that_is_too_large_is_refused_and_not_taken_for_a_mistake(compiler):
    refused = compiler["refused"]
    assert not refused["fits"] and out_of_memory(RuntimeError(refused["problem"])), refused["problem"]
    assert "does not fit: RESOURCE_EXHAUSTED" in refused["described"]


def test_every_kind_of_chip_takes_the_kernel_for_attention(compiler):
    """One forward, one backward."""
    assert compiler["kernels"] == {"v4": 2, "v5e": 2, "v5p": 2, "v6e": 2}
    assert "compiler's guess" in compiler["step"]["described"]


def test_slices_have_as_many_devices_as_chips(compiler):
    assert compiler["chips"] == {"v5e:16x16": 256, "v4:4x4x4": 64, "v5p:8x8x16": 1024, "v6e:8x8": 64}


def test_a_mesh_may_split_an_axis_of_the_torus(compiler):
    chips = {"v4:4x4x4 fsdp=8": 64, "v5p:8x8x16 fsdp=4": 1024, "v6e:8x8 fsdp=4": 64, "v5e:16x16 fsdp=8": 256}
    assert compiler["meshes"] == chips


def test_the_rows_of_all_hosts_make_up_the_batch(compiler):
    """On a slice the mesh follows the wiring; whatever its order, every row belongs to the hosts of one device."""
    rows = compiler["rows"]
    assert len(rows) > 1 and sorted(sum(rows.values(), [])) == list(range(64))


def test_only_data_crosses_from_slice_to_slice(compiler):
    two = compiler["two_slices"]
    assert two["data"] == 4 and two["slices"] == [[0], [0], [1], [1]]
    assert two["error"] == "config.mesh.data is 1; 2 slices need a multiple of 2"


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:2", "v5e:2xa"])
def test_a_slice_that_cannot_be_read_is_named(topology):
    with pytest.raises(ValueError, match=f"--topology={topology}: write kind:shape"):
        tpu_devices(topology)


def test_a_mesh_is_read_from_its_sizes():
    assert with_mesh(tiny(), "data=-1,fsdp=8").mesh.to_dict() == {"data": -1, "fsdp": 8, "tensor": 1}
    for wrong in ("dat=3", "data", "data=2;fsdp=2"):
        with pytest.raises(ValueError, match=f"--mesh={wrong}: write sizes"):
            with_mesh(tiny(), wrong)


def test_a_config_that_cannot_run_on_the_slice_is_refused_before_compiling():
    with pytest.raises(ConfigError, match="does not fit 8 device"):
        compile_step(tiny(**{"mesh.fsdp": 3}), "images", jax.devices(), "v5e:2x4")


def test_the_abstract_batch_is_that_of_the_stream():
    config, mesh = tiny(), sharding.make_mesh(devices=jax.devices())
    batch = build.batch_shapes(config, "images", mesh)
    assert batch.pixels.shape == (16, 1, 64, 64, 3) and batch.pixels.dtype == np.uint8
    assert batch.token_ids.shape == (16, config.data.text_length)
    assert all(x.sharding == sharding.batch_sharding(mesh) for x in jax.tree.leaves(batch))


def test_policies_that_need_less_memory_are_tried_until_one_fits(monkeypatch):
    def compiled(config, *_):
        fits = config.model.remat == "full"
        return findings(remat=config.model.remat, fits=fits, problem="" if fits else "RESOURCE_EXHAUSTED: 33G of 15G")

    monkeypatch.setattr(compile_tpu, "compile_step", compiled)
    tried = find(tiny(), "images", [], "v5e:2x4", 4)
    assert [(x.remat, x.fits) for x in tried] == [("none", False), ("dots", False), ("full", True)]
    assert "does not fit: RESOURCE_EXHAUSTED: 33G of 15G" in describe(tried[0])


def test_findings_are_told_in_units_of_people():
    seconds = {"fusion": 0.012, "vision/mlp": 0.0035}
    told = describe(findings(warnings=["Involuntary full rematerialization"], seconds_by_scope=seconds))
    assert "compiler's guess      15.5 ms a step, without kernels and collectives: fusion 12.0, vision/mlp 3.5" in told
    assert "memory a chip         3.00 GiB of 16.00: arguments 1.00, temporaries 2.00" in told
    assert "FLOPs a chip         2.500 T compiled, 2.000 T as written" in told
    assert "all-reduce            16.0 MiB sent a chip by 4" in told
    assert "warning           Involuntary" in told and told.endswith("fits with remat full")


def records(*changes: dict) -> list[dict]:
    return [dataclasses.asdict(findings(**change)) for change in changes]


def test_tables_hold_every_step_and_relate_more_chips_to_the_fewest():
    few = {"mesh": {"data": 2, "fsdp": 4}, "remat": "none"}
    more = {"topology": "v5p:4x4x4", "chips": 64, "batch_size": 1024, "mesh": {"data": 16, "fsdp": 4}, "flops": 2.55e12}
    more["remat"] = "none"
    refused = {"topology": "v5e:2x4", "fits": False, "problem": "RESOURCE_EXHAUSTED"}
    text = scaling_table.document(records(few, more, refused))
    assert (
        "| pretrain_image | images | v5p:2x2x2 | 8 | data 2 × fsdp 4 | 128 | none | 1.00 + 2.00 | 3.00 of 16.00 |"
        in text
    )
    assert "| refused |" in text
    assert "| 64 | 1024 | 2.550 | +2.0% | 3.00 | +0.0% | 16.0 |" in text
    command = "--topology=v5p:4x4x4 --mesh=data=16,fsdp=4 --streams=images --config.data.images.batch_size=1024"
    command += " --config.model.remat=none"
    assert text.count(command) == 1


def test_a_step_that_is_recorded_is_not_compiled_again():
    step = scaling_table.Step("pretrain_image", "images", "v5p:2x2x2", 128, fsdp=8)
    assert step.is_in(records({})) and not step.is_in(records({"batch_size": 256}))
    assert not step.is_in(records({"fits": False, "remat": "none"}))  # "auto" goes on to what needs less
    assert not dataclasses.replace(step, remat="none").is_in(records({}))
    assert {"--mesh=data=-1,fsdp=8", "--config.data.images.batch_size=128"} <= set(step.command("x.jsonl"))


def test_a_line_that_is_no_record_is_said_by_its_number(tmp_path):
    file = tmp_path / "scaling.jsonl"
    for wrong in ("{", "[]", "{}", '{"mesh": {}}', "3"):
        file.write_text(f"{json.dumps(dataclasses.asdict(findings()))}\n{wrong}\n")
        with pytest.raises(ValueError, match="scaling.jsonl, line 2: no record of scl_jax.compile_tpu"):
            scaling_table.read(file)


def test_plans_are_chosen_by_name_and_number():
    assert scaling_table.chosen_steps(["weak/0"]) == [scaling_table.PLANS["weak"][0]]
    assert len(scaling_table.chosen_steps(["sizes", "weak"])) == len(scaling_table.PLANS["sizes"]) + 4
    for wrong in ("width", "weak/4", "weak/x"):
        with pytest.raises(ValueError, match=f"--plan={wrong}: choose"):
            scaling_table.chosen_steps([wrong])


def test_the_compiler_gets_roomy_stacks_unless_told_otherwise():
    env = {"LIBTPU_INIT_ARGS": "--xla_a=1"}
    roomy_stacks(env)
    roomy_stacks(env)
    assert env == {"LIBTPU_INIT_ARGS": "--xla_a=1 --fibers_default_thread_stack_size=1048576"}
