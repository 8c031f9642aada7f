"""Every config in configs/ passes its checks, and its network and step can be built; only shapes, no numbers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from scl_jax import build
from scl_jax.config import ConfigError, active_streams, finalize
from scl_jax.config_check import check
from scl_jax.data import builders
from scl_jax.models import parameters
from scl_jax.objectives.masks import MaskSpec
from scl_jax.objectives.views import OBJECTIVES
from scl_jax.tasks.pretrain import Ramp
from scl_jax.training.optimizer import OptimizerConfig
from scl_jax.training.sharding import make_mesh
from scl_jax.training.state import TrainState
from scl_jax.training.step import make_step
from scl_jax.types import Batch

CONFIGS = Path(__file__).parents[1] / "configs"
EVERY = sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("common"))
PAPER = ("pretrain_image", "pretrain_video", "pretrain_joint", "pretrain_large")
ROBERTA_VOCAB = 50265
ROWS = 32  # of a batch; the step is the same function at every size


def load(name):
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = [name for name in EVERY if load(name).get_config().task == "pretrain"]  # the others: test_task_configs.py


def finalized(name):
    config = load(name).get_config()
    return finalize(config, config.model.text.vocab_size or 1000)


def parameter_count(name):
    return parameters.count(parameters.abstract(build.model_maker(finalized(name)))[1])


def abstract_batch(config, stream, rows=ROWS):
    s, length = config.data[stream], config.data.text_length
    text = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return Batch(
        pixels=jax.ShapeDtypeStruct((rows, s.frames, s.image_size, s.image_size, 3), jnp.uint8),
        token_ids=text,
        token_mask=jax.ShapeDtypeStruct((rows, length), jnp.bool_),
        word_ids=text,
        weight=jax.ShapeDtypeStruct((rows,), jnp.float32),
        item_id=jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


@pytest.mark.parametrize("name", EVERY)
def test_a_config_opens_with_its_run_command(name):
    assert f"python -m scl_jax.main --config=configs/{name}.py --workdir=runs/" in load(name).__doc__.splitlines()[0]


@pytest.mark.parametrize("name", FILES)
def test_a_config_passes_its_checks_on_the_devices_it_is_for(name):
    config = finalized(name)
    for devices in (8, 256) if name in PAPER else (1, 8):
        check(config, config.model.text.vocab_size, devices=devices)
    assert config.evaluate.every % config.log.every == 0
    assert config.train.checkpoint_every % config.log.every == 0


def abstract_step(config):
    """The step with all objectives, (state, batch) → (state, metrics), and the shapes of its state."""
    task = build.pretraining(config, vocab_size=config.model.text.vocab_size, mask_id=4)
    assert task.active(config.train.steps) == OBJECTIVES
    graph, params = parameters.abstract(build.model_maker(config))
    tx = build.optimizer_maker(config)(params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params))
    step = make_step(
        task,
        graph,
        tx,
        build.schedule(config),
        seed=0,
        accumulate=config.train.accumulate,
        dropout=config.model.dropout > 0,
    )
    return lambda state, batch: step(state, batch, OBJECTIVES), state


@pytest.mark.parametrize("name", [name for name in FILES if name != "pretrain_image"])  # a stream of pretrain_joint
def test_every_stream_of_a_config_has_a_step_with_all_objectives(name):
    config = finalized(name)
    step, state = abstract_step(config)
    assert active_streams(config)
    for stream in active_streams(config):
        after, metrics = jax.eval_shape(step, state, abstract_batch(config, stream))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after.params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state.params
        )
        assert {f"loss/{objective}" for objective in OBJECTIVES} <= set(metrics)
        assert all(value.shape == () for value in metrics.values())


def program(name):
    """The text of a config's step, as it goes to the compiler."""
    config = finalized(name)
    step, state = abstract_step(config)
    return jax.jit(step).lower(state, abstract_batch(config, "images")).as_text()


def test_every_process_makes_the_same_program():
    """Whatever order its sets have: hosts that run together must agree, the compilation cache looks for the text."""
    code = "import hashlib, test_configs as t; print(hashlib.sha256(t.program('quickstart').encode()).hexdigest())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(CONFIGS.parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in "12"
    ]
    first, second = (process.communicate()[0] for process in processes)
    assert len(first) == 65 and first == second


def test_the_papers_network_has_its_size():
    """CLIP ViT-B/16 without its last block, RoBERTa-base, six co-attention layers, and the heads."""
    assert parameter_count("pretrain_image") == 359_877_724
    assert parameter_count("pretrain_joint") == parameter_count("pretrain_image")
    smaller_grid = (18**2 - 14**2) * 768  # rows of the position table
    assert parameter_count("pretrain_image") - parameter_count("pretrain_video") == smaller_grid


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings_are_those_of_the_method(name):
    """METHOD sections 3 to 6."""
    config = finalized(name)
    task, optimizer = build.pretraining(config, ROBERTA_VOCAB, ROBERTA_VOCAB - 1), build.optimizer_config(config)
    weights = dict.fromkeys(OBJECTIVES, 1.0) | {"contrastive": 0.5, "local_vision": 0.2, "local_text": 0.2}
    assert task.ramps == {objective: Ramp(weight) for objective, weight in weights.items()}
    assert task.global_temperature == {"global_vision": 0.03, "global_text": 0.03}
    assert task.local_temperature == {"local_vision": 0.03, "local_text": 0.03}
    m = task.masks
    assert (m.drop_ratio, m.replace_ratio, m.language_ratio, m.text_ratio) == (0.8, 0.3, 0.15, 0.4)
    assert m.hard_negatives == 0 and not task.norm_over_frames
    assert optimizer == OptimizerConfig(2e-5, 0.0, 0.1, "linear", 0.9, 0.98, 1e-8, 0.01, 0.0, 5.0, 5.0)
    model, data = build.model_config(config), config.data
    assert model.initial_temperature == 0.07 and model.precision.initializer_range == 0.02
    for part in (model.text, model.fusion):
        assert part.dropout == part.attention_dropout == 0.1
    assert data.text_length == 50
    for stream in active_streams(config):
        s = data[stream]
        assert (tuple(s.crop_scale), s.flip, tuple(s.rand_augment)) == ((0.8, 1.0), "unless_sided", (0, 0))
        if name != "pretrain_large":
            assert (s.frames, s.image_size) == {"images": (1, 288), "videos": (4, 224)}[stream]


def test_every_option_reaches_its_place():
    """No two have the same value here."""
    config = finalized("quickstart")
    o, m = config.objectives, config.model
    for number, name in enumerate(OBJECTIVES):
        o[name].update(weight=0.1 + number / 100, start=number, ramp=10 + number)
    for number, name in enumerate(("global_vision", "global_text", "local_vision", "local_text")):
        o[name].temperature = round(0.2 + number / 100, 2)
    o.global_vision.drop_ratio, o.local_vision.replace_ratio, o.masked_language.mask_ratio = 0.31, 0.32, 0.33
    o.text_mask_ratio, o.matching.hard_negatives, o.group_size = 0.34, 0.35, 4
    o.contrastive.update(temperature_min=0.36, temperature_max=0.37)
    m.update(dropout=0.38, attention_dropout=0.39, initial_temperature=0.361)
    task, model = build.pretraining(config, 90, 4), build.model_config(config)
    assert task.ramps == {name: Ramp(0.1 + i / 100, i, 10 + i) for i, name in enumerate(OBJECTIVES)}
    assert task.global_temperature == {"global_vision": 0.2, "global_text": 0.21}
    assert task.local_temperature == {"local_vision": 0.22, "local_text": 0.23}
    assert task.masks == MaskSpec(90, 4, 5, 0.31, 0.32, 0.33, 0.34, 4, 0.35)
    assert task.temperature_range == (0.36, 0.37) and model.initial_temperature == 0.361
    for part in (model.text, model.fusion):
        assert (part.dropout, part.attention_dropout) == (0.38, 0.39)


def test_the_step_takes_its_options_from_the_config(monkeypatch):
    told = []
    monkeypatch.setattr(build, "make_step", lambda *_, **options: told.append(options) or (lambda *x: x))
    monkeypatch.setattr(build, "state_shardings", lambda *_: None)
    config = finalized("quickstart")
    config.seed, config.train.accumulate, config.optimizer.ema = 7, 2, 0.9
    for rates in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1)):
        config.model.dropout, config.model.attention_dropout = rates
        build.train_step(config, None, None, None, SimpleNamespace(params=None, ema=None), make_mesh())
    for options, dropout in zip(told, (False, True, True), strict=True):
        assert options == {"seed": 7, "accumulate": 2, "dropout": dropout, "ema": 0.9}


def test_a_larger_network_is_a_matter_of_configuration():
    assert parameter_count("pretrain_large") == 906_721_372


def test_a_resolution_that_patches_do_not_divide_is_named():
    config = load("pretrain_large").get_config()
    config.data.images.image_size = 288
    with pytest.raises(ConfigError, match="image_size 288 does not divide by model.vision.patch_size 14"):
        check(config, ROBERTA_VOCAB, devices=8)


@pytest.mark.parametrize("name", EVERY)
def test_the_public_data_sets_of_a_config_have_the_splits_that_it_reads(name):
    config = load(name).get_config()
    e = config.evaluate
    held_out = {e.final_split} | ({e.split} if e.every or len(e.matching_weights) > 1 else set())
    for stream in active_streams(config):
        trained, evaluated = config.data[stream].datasets, config.data[stream].evaluation_datasets
        wanted = [(trained, {"train"}), (evaluated if any(evaluated) else trained, held_out)]
        for dataset, splits in ((dataset, splits) for datasets, splits in wanted for dataset in datasets):
            public = getattr(builders.builder_module(dataset.partition("/")[0]), "DATASET", None)
            assert public is None or splits <= set(public.published), dataset


@pytest.mark.parametrize("name", PAPER)
def test_a_data_set_that_is_not_prepared_is_an_error_that_says_how_to(name, tmp_path):
    config = finalized(name)
    for stream in active_streams(config):
        for dataset in config.data[stream].datasets:
            with pytest.raises(FileNotFoundError, match=f"{dataset}: no prepared shards .* prepare them with `python"):
                builders.open_source(dataset, "train", tmp_path)
