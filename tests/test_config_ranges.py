"""No option takes nonsense: each is tried, and each is named by the one report."""

from __future__ import annotations

import math

import pytest
from test_config import VOCAB, config_with

from scl_jax.config import ConfigError, default_config
from scl_jax.config_check import check
from scl_jax.config_ranges import options_of, rule_of
from scl_jax.objectives.views import OBJECTIVES

OPTIONS = dict(options_of(default_config()))
NUMBERS = [name for name, value in OPTIONS.items() if isinstance(value, int | float) and not isinstance(value, bool)]
TUPLES = [name for name, value in OPTIONS.items() if isinstance(value, tuple)]
NONSENSE = {"train.profile_steps": (5, 2), "data.images.crop_scale": (0.9, 0.5), "data.videos.rand_augment": (2, 31)}


def nonsense(name: str) -> list:
    """Values of the option's type that mean nothing."""
    if isinstance(OPTIONS[name], int):
        return [-7, 2**40]
    return [-7.0, math.nan, math.inf]


def refused(changes: dict) -> str:
    with pytest.raises(ConfigError) as error:
        check(config_with(**changes), VOCAB, devices=8)
    return str(error.value)


def test_every_option_has_a_rule_that_its_default_keeps():
    assert [rule_of(name).problem(name, value) for name, value in OPTIONS.items()] == [""] * len(OPTIONS)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NUMBERS for value in nonsense(name)])
def test_a_number_that_means_nothing_is_named(name, value):
    problems = refused({name: value}).splitlines()[1:]
    assert len(problems) == 1, problems  # and nothing that merely follows from it
    assert f"{name} is {value!r}" in problems[0] or (name.startswith("mesh") and "mesh data=" in problems[0])


@pytest.mark.parametrize("name", TUPLES)
@pytest.mark.parametrize("value", [(), (math.nan, math.nan), (-1, -1), ("a", 1, 2)], ids=str)
def test_a_tuple_that_means_nothing_is_named(name, value):
    assert f"{name} is {value!r}" in refused({name: value})


@pytest.mark.parametrize(("name", "value"), NONSENSE.items())
def test_values_that_do_not_go_together_are_named(name, value):
    assert f"{name} is {value!r}" in refused({name: value})


def test_all_options_at_once_give_one_report_with_a_line_each():
    changes = {name: nonsense(name)[0] for name in NUMBERS if not name.startswith("mesh")}
    changes |= {"model.dtype": "float8", "optimizer.decay": "step"}
    first, *lines = refused(changes).splitlines()
    assert first == f"the config has {len(lines)} problem(s):"
    assert len(lines) == len(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives.contrastive.temperature_min": 2.0}, "temperature_min 2.0 is above temperature_max 1.0"),
        ({"model.initial_temperature": 5.0}, "model.initial_temperature 5.0 lies outside of"),
        ({"evaluate.best": True, "evaluate.every": 0}, "evaluate.best is on; it needs evaluations"),
        ({"objectives.local_vision.replace_ratio": 0.001}, "replace_ratio replaces none"),
        ({f"objectives.{name}.weight": 0.0 for name in OBJECTIVES}, "every objective has weight 0"),
        ({f"objectives.{name}.start": 9 for name in OBJECTIVES}, "no objective takes part before step 9"),
    ],
    ids=lambda value: ", ".join(value)[:60] if isinstance(value, dict) else "",
)
def test_options_that_contradict_each_other_are_named(changes, message):
    assert message in refused(changes)
