"""A step compiled by one process and run by another gives the numbers of a step; here both on a CPU."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np

from scl_jax.tasks.pretrain import OBJECTIVES

ROOT = Path(__file__).parents[2]


def ahead_module():
    spec = importlib.util.spec_from_file_location("ahead", ROOT / "benchmarks" / "ahead.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_compiled_ahead_runs(tmp_path, monkeypatch, capsys):
    ahead = ahead_module()
    monkeypatch.setattr(ahead, "absent_devices", lambda target: jax.devices()[:1])
    options = ["--batch=16", "--set", "debug=1", "model.attention=xla", "model.unroll=1"]
    options += [f"objectives.{name}.weight=0" for name in OBJECTIVES if name != "masked_language"]  # they take time
    ahead.compile_step(ahead.parse(["compile", str(tmp_path), *options]))
    ahead.run_all(ahead.parse(["run", str(tmp_path), "--repeats=2", "--trace"]))
    (file,) = tmp_path.glob("*.results.json")
    results = json.loads(file.read_text())
    assert results["samples_per_second"] > 0 and np.isfinite(results["loss"]) and len(results["seconds"]) == 2
    assert {"vision/mlp", "fusion/attention backward"} <= results["seconds_by_scope"].keys()
    assert "samples/s" in capsys.readouterr().out


def test_every_step_has_a_file_of_its_own():
    ahead = ahead_module()
    many = [f"objectives.{name}.weight=0" for name in OBJECTIVES]
    commands = (
        ["--batch=64"],
        ["--batch=64", "--stream=videos"],
        ["--batch=64", "--config=configs/pretrain_large.py"],
        ["--batch=64", "--target=h200"],
        ["--batch=64", "--set", "model.remat=full"],
        ["--batch=64", "--set", *many],
        ["--batch=64", "--set", *many[1:]],
    )
    names = [ahead.file_name(ahead.parse(["compile", "runs/ahead", *options])) for options in commands]
    assert names[0] == "pretrain_image-h100-images-64" and len(set(names)) == len(names)
    assert max(map(len, names)) + len(".results.json") <= 255
