"""Every parameter has a place on every mesh, and nothing large is on every device."""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from scl_jax import build
from scl_jax.config import finalize
from scl_jax.models import parameters
from scl_jax.models.fusion import FusionConfig
from scl_jax.models.scl import SCL, SCLConfig
from scl_jax.models.text import TextConfig
from scl_jax.models.vision import VisionConfig
from scl_jax.training.optimizer import OptimizerConfig, make_optimizer
from scl_jax.training.sharding import PLAN, make_mesh, process_rows, shard_optimizer, shard_params, spec_of
from scl_jax.training.state import init_state

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]


def shapes_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = finalize(module.get_config(), vocab_size=512)
    return parameters.abstract(build.model_maker(config))[1]


@lru_cache
def tiny():
    """A network whose every size divides by 8, as a function of its random generators."""
    sizes = {"width": 32, "layers": 2, "heads": 8, "mlp_width": 64}
    config = SCLConfig(
        vision=VisionConfig(**sizes, patch_size=8, image_size=32),
        text=TextConfig(**sizes, vocab_size=64, max_positions=16),
        fusion=FusionConfig(**sizes),
        projection_width=16,
    )
    return partial(SCL, config)


@lru_cache
def state_on(*sizes: int):
    """A fresh state with an average on a mesh of these sizes."""
    make_tx = partial(make_optimizer, OptimizerConfig(), 100)
    return init_state(tiny(), make_tx, make_mesh(*sizes), seed=3, with_ema=True)[2]


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if not path.stem.startswith("common")], ids=lambda path: path.stem
)
def test_every_parameter_of_a_config_has_a_plan_of_its_rank(path):
    for name, x in parameters.flatten(shapes_of(path)).items():
        axes = next((axes for pattern, axes in PLAN if re.fullmatch(pattern, name)), None)
        assert axes is not None, f"no plan for {name} {x.shape}"
        assert len(axes) in (0, x.ndim), f"{name} {x.shape} is planned as {axes}"


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_parameter_fits_every_mesh(sizes):
    mesh = make_mesh(*sizes)
    shapes = parameters.flatten(parameters.abstract(tiny())[1])
    for name, sharding in parameters.flatten(shard_params(parameters.abstract(tiny())[1], mesh)).items():
        sharding.shard_shape(shapes[name].shape)  # raises where a dimension does not divide


def test_a_parameter_that_the_plan_does_not_know_is_an_error():
    with pytest.raises(ValueError, match=r"training/sharding.py .* new.thing \(3, 4\)"):
        spec_of("new.thing", (3, 4), make_mesh())


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh(1, 8, 1)
    assert spec_of("matching.dense.kernel", (64, 2), mesh) == PartitionSpec("fsdp", None)
    assert spec_of("matching.dense.kernel", (60, 2), mesh) == PartitionSpec(None, None)


def test_heads_and_feed_forward_are_split_over_tensor():
    mesh = make_mesh(1, 1, 8)
    specs = {path: s.spec for path, s in parameters.flatten(shard_params(parameters.abstract(tiny())[1], mesh)).items()}
    assert specs["text.layers.each.attention.qkv.kernel"] == PartitionSpec(None, "fsdp", None, "tensor", None)
    assert specs["text.layers.each.attention.out.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["vision.blocks.each.mlp.up.kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["vision.blocks.each.mlp.down.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["fusion.layers.each.image.cross_attention.key_value.bias"] == PartitionSpec(None, None, "tensor", None)


def test_parameters_moments_and_average_are_created_split():
    """On an 8-way fsdp mesh each device holds an eighth of every kernel, of both its moments and of its average."""
    state = state_on(1, 8, 1)
    specs = {path: x.sharding.spec for path, x in parameters.flatten(state.params).items()}
    kernels = [path for path in specs if path.endswith("kernel") or "word_embedding" in path]
    assert len(kernels) > 20
    copies = dict.fromkeys(kernels, 0)
    for where, x in jax.tree.leaves_with_path((state.params, state.opt_state, state.ema)):
        name = ".".join(str(key.key) for key in where if hasattr(key, "key"))
        if name in copies:
            copies[name] += 1
            (shard, *_) = x.addressable_shards
            assert shard.data.size * 8 == x.size, f"{jax.tree_util.keystr(where)} {x.shape} is {x.sharding.spec}"
    assert set(copies.values()) == {4}  # parameter, two moments, average


def test_moments_lie_as_their_parameters_do():
    mesh = make_mesh(2, 2, 2)
    shapes = parameters.abstract(tiny())[1]
    tx = make_optimizer(OptimizerConfig(adam_eps_uncorrected=True), 100, shapes)
    layout = parameters.flatten(shard_params(shapes, mesh))
    seen = 0
    for where, sharding in jax.tree.leaves_with_path(shard_optimizer(tx, shapes, mesh)):
        name = ".".join(str(key.key) for key in where if hasattr(key, "key"))
        if name in layout:
            assert sharding == layout[name], name
            seen += 1
        else:
            assert sharding.is_fully_replicated  # step counters
    assert seen == 2 * len(layout)


def test_a_fresh_state_has_the_same_numbers_on_every_mesh():
    """To the last bit but one: the compiler evaluates the normal distribution in vectors that depend on the shard."""
    first, second = state_on(1, 8, 1), state_on(2, 2, 2)
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-7, atol=0)
    for a, b in zip(jax.tree.leaves(first.ema), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_process_makes_the_rows_that_its_devices_hold(monkeypatch):
    """All of them where it is alone; else those of its devices, which need not be neighbours, each once, in order."""
    assert process_rows(make_mesh(4, 1, 2), 16) == list(range(16))
    places = {"a": (slice(12, 16),), "b": (slice(4, 8),), "c": (slice(12, 16),)}
    layout = SimpleNamespace(addressable_devices_indices_map=lambda shape: places)
    monkeypatch.setattr("scl_jax.training.sharding.batch_sharding", lambda mesh: layout)
    assert process_rows(make_mesh(), 16) == [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize(("sizes", "shape"), [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((2, 4, 1), (2, 4, 1))])
def test_one_mesh_size_takes_the_devices_that_the_others_leave(sizes, shape):
    assert tuple(make_mesh(*sizes).shape.values()) == shape


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 1, 1),
        (-1, 3, 1),
        (-1, -1, 1),
        (-2, -4, 1),
        (16, 1, 1),
        (-1, 0, 1),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_the_devices_is_named(sizes):
    data, fsdp, tensor = sizes
    message = rf"config.mesh \(data={data}, fsdp={fsdp}, tensor={tensor}\) does not fit 8 devices"
    with pytest.raises(ValueError, match=message):
        make_mesh(*sizes)
