"""The table is total both ways, and its round trip gives back the same bits."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from golden_case import GOLDEN
from safetensors.numpy import load_file

from scl_jax.convert.full_model import MAY_MISS, model_shapes
from scl_jax.convert.rules import DROPS, RULES, ConversionError, flax_to_torch, torch_to_flax
from scl_jax.convert.torch_config import SCLConfig


def weights_of(tag: str, downstream: bool = False) -> dict[str, np.ndarray]:
    weights = load_file(GOLDEN / f"{tag}.safetensors")
    return weights | load_file(GOLDEN / f"{tag}_downstream.safetensors") if downstream else weights


def shapes_of(weights: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return model_shapes(SCLConfig.infer({name: x.shape for name, x in weights.items()}, head_width=8))


@pytest.mark.parity
@pytest.mark.parametrize("downstream", [False, True], ids=["pretraining", "downstream"])
def test_there_and_back_gives_the_same_bits_for_every_key(tag: str, downstream: bool) -> None:
    weights = weights_of(tag, downstream)
    flat, report = torch_to_flax(weights, shapes_of(weights), may_miss=MAY_MISS)
    back = flax_to_torch(flat)
    assert set(back) == set(weights) - set(report.dropped)
    for name, value in back.items():
        assert value.dtype == weights[name].dtype and value.shape == weights[name].shape, name
        assert value.tobytes() == weights[name].tobytes(), name


@pytest.mark.parity
def test_back_and_there_gives_the_same_bits_for_every_parameter(tag: str) -> None:
    shapes = shapes_of(weights_of(tag, downstream=True))
    random = np.random.default_rng(0)
    flat = {path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    again, _ = torch_to_flax(flax_to_torch(flat), shapes)
    jax.tree.map(np.testing.assert_array_equal, again, flat)


def test_a_key_that_is_missing_extra_or_of_another_shape_is_named() -> None:
    weights = weights_of("tiny_image")
    shapes = shapes_of(weights)
    broken = dict(weights) | {"stranger": np.zeros(3, np.float32)}
    del broken["text_transformer.encoder.layer.1.output.dense.bias"]
    broken["itm_score.fc.weight"] = broken["itm_score.fc.weight"].T
    with pytest.raises(ConversionError) as error:
        torch_to_flax(broken, shapes, may_miss=MAY_MISS)
    message = str(error.value)
    assert "missing: text_transformer.encoder.layer.1.output.dense.bias" in message
    assert "unused: stranger (3,)" in message
    assert "itm_score.fc.weight is (64, 2), but matching.dense.kernel needs (2, 64)" in message


@pytest.mark.parametrize("name", ["vision_transformer.visual.transformer.resblocks.0.attn.in_proj_weight", "cl_temp"])
def test_as_many_numbers_in_another_shape_are_no_match(name: str) -> None:
    weights = weights_of("tiny_image")
    shapes = shapes_of(weights)
    weights[name] = weights[name].reshape(-1, 1)
    with pytest.raises(ConversionError, match=name):
        torch_to_flax(weights, shapes, may_miss=MAY_MISS)


def test_what_may_be_absent_is_reported() -> None:
    weights = weights_of("tiny_image")
    _, report = torch_to_flax(weights, shapes_of(weights), may_miss=MAY_MISS)
    assert report.untouched == ["vision.temporal_embedding"]
    with pytest.raises(ConversionError, match="temporal_embed"):
        torch_to_flax(weights, shapes_of(weights))


def test_a_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(ConversionError, match="fusion.surprise"):
        flax_to_torch({"fusion.surprise": np.zeros(1)})
    with pytest.raises(ConversionError, match="no rule fills fusion.surprise"):
        torch_to_flax({}, {"fusion.surprise": (1,)})


def test_every_rule_and_drop_is_said_once() -> None:
    names = [name for rule in RULES for name in rule.torch]
    assert len(names) == len(set(names)) and len({rule.flax for rule in RULES}) == len(RULES)
    assert all(drop.reason for drop in DROPS)
