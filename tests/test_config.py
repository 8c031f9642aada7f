"""What cannot work is said at once, completely, and before anything is compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from scl_jax.config import ConfigError, active_streams, config_of_run, default_config, differences, finalize
from scl_jax.config_check import check
from scl_jax.objectives.views import OBJECTIVES

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"
VOCAB = 50265


def config_with(**changes):
    """A config that works on 8 devices, with options changed by their dotted names."""
    config = default_config()
    config.data.images.datasets = ("toy_world/images",)
    config.data.videos.update(datasets=("toy_world/videos",), share=0.5)
    config.update_from_flattened_dict(changes)
    return config


def problems_of(config, devices: int = 8, processes: int = 1) -> list[str]:
    """The lines of the one error that `check` raises, without its first."""
    with pytest.raises(ConfigError) as error:
        check(config, VOCAB, devices, processes)
    first, *problems = str(error.value).split("\n")
    assert first == f"the config has {len(problems)} problem(s):"
    return [problem.strip() for problem in problems]


def test_the_default_config_with_data_passes():
    check(config_with(), VOCAB, devices=8)


def test_a_batch_of_evaluation_may_be_less_than_a_group_and_fine_tuning_draws_no_groups_there():
    check(config_with(**{"evaluate.batch_size": 8}), VOCAB, devices=8)
    check(config_with(**{"evaluate.batch_size": 24, "task": "retrieval"}), VOCAB, devices=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.images.batch_size": 4100}, "data.images.batch_size 4100 does not divide by 8 .* that does is 4104"),
        ({"data.images.batch_size": 0}, "data.images.batch_size is 0; it must be at least 1"),
        ({"train.accumulate": 0}, "train.accumulate is 0; 1 means no accumulation"),
        ({"train.accumulate": 3}, r"data.videos.batch_size 1024 .* × train.accumulate 3; the next that does is 1032"),
        (
            {"objectives.group_size": 12},
            r"batch_size 4096 does not divide .* whole groups \(objectives.group_size 12\)",
        ),
        ({"data.images.image_size": 300}, "data.images.image_size 300 does not divide by model.vision.patch_size 16"),
        ({"model.vision.image_size": 300}, "model.vision.image_size 300 does not divide by patch_size 16"),
        ({"model.vision.patch_size": 0}, "patch_size"),
        ({"data.videos.frames": 9}, r"data.videos.frames is 9, but model.vision.max_frames \(temporal rows\) is 8"),
        ({"data.videos.frames": 0}, "data.videos.frames is 0"),
        ({"data.images.image_size": 32}, "of 4 patches none survives objectives.global_vision.drop_ratio"),
        ({"data.images.resize": "nearest"}, "data.images.resize is 'nearest'; choose bicubic or fast"),
        ({"data.images.flip": "sometimes"}, "data.images.flip is 'sometimes'; choose never, unless_sided or always"),
        ({"mesh.data": 3}, r"mesh data=3, fsdp=1, tensor=1 does not fit 8 device\(s\)"),
        ({"mesh.fsdp": -1}, "mesh data=-1, fsdp=-1, tensor=1 does not fit 8"),
        ({"mesh.data": -2, "mesh.fsdp": -4}, "mesh data=-2, fsdp=-4, tensor=1 does not fit 8"),
        ({"mesh.fsdp": 0}, "mesh data=-1, fsdp=0, tensor=1 does not fit 8"),
        ({"evaluate.batch_size": 100}, r"evaluate.batch_size 100 does not divide by the 8 device\(s\)"),
        (
            {"evaluate.batch_size": 24},
            r"evaluate.batch_size 24 does not divide .* groups \(objectives.group_size 16\); the next that does is 32",
        ),
        ({"evaluate.batch_size": 0}, "evaluate.batch_size is 0; it must be at least 1"),
        ({"model.text.heads": 7}, "model.text: width 768 does not divide by heads 7"),
        ({"model.vision.layers": 0}, "model.vision.layers is 0; it must be at least 1"),
        ({"model.remat": "some"}, "model.remat is 'some'; choose auto, none, dots or full"),
        ({"model.unroll": -1}, "model.unroll is -1"),
        ({"model.attention": "cudnn", "model.dtype": "float32"}, "model.attention=cudnn needs bfloat16"),
        ({"model.dtype": "float16"}, "model.dtype is 'float16'; choose float32 or bfloat16"),
        ({"model.text.vocab_size": 500}, "vocab_size is 500, but the tokenizer has 50265 tokens; raise it, or set 0"),
        ({"data.text_length": 513}, "data.text_length 513 needs model.text.max_positions of at least 515"),
        ({"data.text_length": 2}, "data.text_length is 2; it must be at least 3"),
        ({"train.steps": 0}, "train.steps is 0"),
        ({"log.every": 0}, "log.every is 0"),
        ({"train.checkpoint_every": 0}, "train.checkpoint_every is 0"),
        ({"evaluate.every": -1}, "evaluate.every is -1; 0 means only at the end"),
        ({"evaluate.best": True, "train.keep_best": 0}, "evaluate.best is on, but train.keep_best is 0: .* at least 1"),
        ({"optimizer.decay": "step"}, "optimizer.decay is 'step'; choose linear, cosine or constant"),
        ({"optimizer.ema": 1.0}, "optimizer.ema is 1.0"),
        ({"optimizer.warmup": -1.0}, "optimizer.warmup is -1.0"),
        ({"objectives.matching.weight": -1.0}, "objectives.matching.weight is -1.0; it must be at least 0"),
        (
            {"objectives.global_vision.drop_ratio": 1.0},
            r"objectives.global_vision.drop_ratio is 1.0; it must lie between 0 \(excluded\) and 1 \(excluded\)",
        ),
        ({"objectives.text_mask_ratio": 1.5}, "objectives.text_mask_ratio is 1.5"),
        ({"objectives.local_text.temperature": 0.0}, "objectives.local_text.temperature is 0.0; it must be positive"),
        ({"data.images.share": 0.0, "data.videos.share": 0.0}, "no data: name data sets in data.images.datasets"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_work_is_named_with_what_to_do(changes, message):
    problems = problems_of(config_with(**changes))
    assert any(re.search(message, problem) for problem in problems), problems


def test_all_problems_are_listed_at_once():
    changes = {"data.images.image_size": 300, "data.videos.frames": 9, "mesh.data": 3, "optimizer.decay": "step"}
    problems = problems_of(config_with(**changes))
    assert len(problems) == 4
    assert [any(name in problem for problem in problems) for name in ("image_size", "frames", "mesh", "decay")] == [
        True
    ] * 4


def test_a_batch_is_split_over_all_devices_but_those_of_tensor():
    config = config_with(**{"evaluate.batch_size": 4, "mesh.tensor": 2})
    check(config, VOCAB, devices=8)
    assert problems_of(config, devices=16) == [
        "evaluate.batch_size 4 does not divide by the 8 device(s) it is split over"
    ]


@pytest.mark.parametrize("data", [1, 2, 4])
def test_tensor_may_take_the_devices_that_the_others_leave(data):
    sizes = {"data.images.batch_size": 16 * data, "data.videos.batch_size": 16 * data, "evaluate.batch_size": data}
    config = config_with(**sizes, **{"mesh.data": data, "mesh.tensor": -1})
    check(config, VOCAB, devices=8)
    config.evaluate.batch_size = 1
    said = [f"evaluate.batch_size 1 does not divide by the {data} device(s) it is split over"]
    assert data == 1 or problems_of(config) == said


def test_of_a_mesh_of_too_many_devices_only_that_is_said():
    said = "mesh data=-1, fsdp=1, tensor=16 does not fit 8 device(s)"
    assert problems_of(config_with(**{"mesh.tensor": 16})) == [said]


def test_a_stream_that_is_off_is_not_checked():
    config = config_with(**{"data.videos.share": 0.0, "data.videos.frames": 99})
    assert active_streams(config) == ["images"]
    check(config, VOCAB, devices=8)


@pytest.fixture
def parse(monkeypatch):
    """A function: overrides of a command line → the config, as in main.py."""

    def run(*overrides: str):
        arguments = ["main", f"--config={QUICKSTART}", *overrides]
        monkeypatch.setattr(sys, "argv", arguments)  # config_flags looks there for overrides
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(arguments)
        return values.config

    return run


def test_overrides_of_the_command_line_reach_the_config(parse):
    config = parse("--config.train.steps=7", "--config.data.images.crop_scale=(0.5, 1.0)", "--config.debug")
    assert (config.train.steps, config.data.images.crop_scale, config.debug) == (7, (0.5, 1.0), True)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("--config.train.step=7", "step"),
        ("--config.objectives.contrastiv.weight=1.0", "contrastiv"),
        ("--config.trane.steps=7", "trane"),
        ("--confg=3", "confg"),
    ],
)
def test_an_unknown_key_is_an_error(parse, override, name):
    with pytest.raises((AttributeError, KeyError, flags.Error), match=name):
        parse(override)


@pytest.mark.parametrize(
    "override",
    ["--config.train.steps=many", "--config.train.steps=1.5", "--config.optimizer.learning_rate=fast"],
)
def test_a_value_of_the_wrong_type_is_an_error(parse, override):
    with pytest.raises((TypeError, ValueError, flags.IllegalFlagValueError)):
        parse(override)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "error: there is no config file nowhere.py"),
        (["--config=configs"], "error: there is no config file configs"),
        ([f"--config={QUICKSTART}:toy"], "error: what stands behind the colon .* takes 0 positional arguments"),
        ([f"--config={QUICKSTART}", "--config.trane.steps=7"], 'error: .* not have: trane; did you mean "train"'),
    ],
)
def test_the_command_answers_a_mistaken_flag_with_one_line(arguments, message):
    command = [sys.executable, "-m", "scl_jax.main", "--workdir=nowhere", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 1 and re.fullmatch(message + ".*\n", done.stderr), done.stderr


_SLOW = pytest.mark.slow  # they import jax before their flags are read
_COMPILE = f"compile_tpu --topology=v5e:2x2 --config={QUICKSTART}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("benchmark step --config=nowhere.py", "error: there is no config file nowhere.py"),
        ("benchmark step --config.trane.steps=7", 'error: .* not have: trane; did you mean "train"'),
        pytest.param("compile_tpu --config=nowhere.py", "error: there is no config file nowhere.py", marks=_SLOW),
        pytest.param(f"{_COMPILE} --streams=audio", "error: --streams=audio: the config has images", marks=_SLOW),
    ],
)
def test_the_other_commands_that_read_a_config_do_so_too(command, message):
    name, *rest = command.split()
    command = [sys.executable, "-m", f"scl_jax.{name}", *rest]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 1 and re.fullmatch(message + ".*\n", done.stderr), done.stderr


def test_unknown_keys_in_a_config_file_are_errors():
    config = default_config()
    with pytest.raises(AttributeError):
        config.train.step = 7
    with pytest.raises((AttributeError, KeyError)):
        config.data.images.update(batchsize=3)


def test_wrong_types_in_a_config_file_are_errors():
    with pytest.raises(TypeError):
        default_config().train.steps = "many"


def test_finalize_takes_the_tokenizers_size_and_leaves_the_original_alone():
    config = config_with(**{"model.text.vocab_size": 0})
    assert finalize(config, 512).model.text.vocab_size == 512
    assert config.model.text.vocab_size == 0
    assert finalize(config_with(), 512).model.text.vocab_size == VOCAB


def test_debug_shrinks_every_part_and_runs_every_objective():
    config = config_with(debug=True)
    for name in OBJECTIVES:
        config.objectives[name].start = 100
    small = finalize(config, VOCAB)
    check(small, VOCAB, devices=8)
    assert small.train.steps <= 20
    assert {small.model[part].width for part in ("vision", "text", "fusion")} == {32}
    assert {small.data[stream].batch_size for stream in active_streams(small)} == {16}
    assert all(small.objectives[name].start < small.train.steps for name in OBJECTIVES)
    assert config.model.text.width == 768


def test_debug_starts_from_no_encoder_of_full_size():
    config = config_with(debug=True, **{"init.vision": "openai/clip", "init.text": "roberta-base"})
    config.init.checkpoint = "runs/small"  # of a run that may be as small
    assert finalize(config, VOCAB).init.to_dict() == {"checkpoint": "runs/small", "vision": "", "text": ""}


def test_debug_leaves_alone_what_is_off_or_smaller_in_the_evaluation():
    off = {"evaluate.every": 0, "evaluate.rerank": 0, "evaluate.max_items": 5, "evaluate.batch_size": 8}
    small = finalize(config_with(debug=True, **off), VOCAB)
    assert {name: small.evaluate[name.partition(".")[2]] for name in off} == off
    large = {"evaluate.every": 500, "evaluate.rerank": 128, "evaluate.max_items": 0, "evaluate.batch_size": 64}
    small = finalize(config_with(debug=True, **large), VOCAB).evaluate
    assert (small.every, small.rerank, small.max_items, small.batch_size) == (10, 8, 32, 16)


@pytest.mark.parametrize("devices", [1, 6, 8, 12, 32, 64])
def test_debug_takes_batches_that_any_number_of_devices_can_share(devices):
    small = finalize(config_with(debug=True), VOCAB, devices=devices)
    check(small, VOCAB, devices=devices)
    sizes = {small.evaluate.batch_size, *(small.data[stream].batch_size for stream in active_streams(small))}
    other = finalize(config_with(debug=True, **{"evaluate.batch_size": 16}), VOCAB, devices=devices)
    check(other, VOCAB, devices=devices)
    assert sizes == {{6: 24, 12: 24, 32: 32, 64: 64}.get(devices, 16)}


def test_debug_of_the_quickstart_passes(parse):
    config = finalize(parse("--config.debug"), 512)
    check(config, 512, devices=jax.device_count())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ', "not JSON"),
        ('{"train": {"steps": "many"}}', r"not the config of a run \(.*'steps'"),
        ('{"train": 5}', "not the config of a run"),
        ("[1]", "not the config of a run"),
    ],
)
def test_a_work_directory_with_a_mistaken_config_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json: {message}"):
        config_of_run(tmp_path)


def test_a_config_read_from_another_folder_says_where_to_run_the_command(tmp_path):
    (tmp_path / "scl_jax").symlink_to(QUICKSTART.parents[1] / "scl_jax")  # as installed
    command = [sys.executable, "-m", "scl_jax.main", "--workdir=nowhere", f"--config={QUICKSTART}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and re.fullmatch("error: .* from the root of the repository\n", done.stderr), (
        done.stderr
    )


def saved(config) -> dict:
    """As it lies in <workdir>/config.json."""
    return json.loads(json.dumps(config.to_dict()))


def test_a_config_does_not_differ_from_its_saved_self():
    assert differences(saved(config_with()), config_with().to_dict()) == []


@pytest.mark.parametrize("option", ["optimizer.learning_rate", "objectives.matching.weight", "data.images.share"])
def test_what_changes_the_outcome_of_a_run_is_a_difference(option):
    (found,) = differences(saved(config_with()), saved(config_with(**{option: 0.25})))
    assert found.startswith(f"{option}: ") and found.endswith(" → 0.25")


def test_options_that_one_side_lacks_are_differences():
    old = saved(config_with())
    del old["objectives"]["group_size"]
    assert differences(old, saved(config_with())) == ["objectives.group_size: None → 16"]


@pytest.mark.parametrize(
    "changes",
    [{"mesh.fsdp": 4}, {"log.every": 1}, {"evaluate.rerank": 3}, {"data.dir": "x"}, {"model.remat": "full"}],
    ids=str,
)
def test_what_leaves_the_numbers_alone_may_change(changes):
    assert differences(saved(config_with()), saved(config_with(**changes))) == []
