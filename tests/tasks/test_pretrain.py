"""When objectives of pre-training take part, and how much they count."""

import pytest

from scl_jax.objectives.masks import MaskSpec
from scl_jax.tasks.pretrain import Pretraining, Ramp


def test_an_objective_counts_from_its_start_on_and_reaches_its_weight_over_its_ramp():
    ramp = Ramp(0.5, start=10, ramp=4)
    assert [ramp.starts_by(step) for step in (0, 9, 10, 99)] == [False, False, True, True]
    assert [float(ramp(step)) for step in (9, 10, 11, 13, 99)] == [0.0, 0.125, 0.25, 0.5, 0.5]
    assert [float(Ramp(0.5, start=10)(step)) for step in (9, 10)] == [0.0, 0.5]


def test_objectives_without_weight_or_before_their_start_take_no_part():
    ramps = {"local_text": Ramp(0.2, start=5), "contrastive": Ramp(0.5), "matching": Ramp(0.0)}
    task = Pretraining(ramps, MaskSpec(60, 4), 16, {}, {})
    assert task.active(4) == ("contrastive",) and task.active(5) == ("contrastive", "local_text")
    weights = {name: float(weight) for name, weight in task.weights(5).items()}
    assert weights == pytest.approx({"local_text": 0.2, "contrastive": 0.5, "matching": 0.0})
