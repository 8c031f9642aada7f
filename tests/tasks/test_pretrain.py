"""When objectives of pre-training take part, how much they count, and what their accuracies are of."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.objectives.masks import MaskSpec
from scl_jax.tasks import pretrain
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


def test_accuracies_are_of_real_pairs_and_of_masked_tokens(monkeypatch):
    """Matching: rows 0 and 1 of three are right. Language: of five tokens the four whose id is even."""
    weight, is_pair = jnp.asarray([1.0, 1, 1, 0]), jnp.asarray([True, False, True, False])
    other_or_pair = jnp.asarray([[0.0, 1], [1, 0], [1, 0], [0, 1]])
    ids = jnp.asarray([[0, 4, 5, 2], [0, 6, 7, 2], [0, 8, 8, 2], [0, 4, 4, 2]])
    slots = jnp.tile(jnp.asarray([1, 2]), (4, 1))
    masks = SimpleNamespace(
        is_pair=is_pair, language_slots=slots, language_valid=jnp.asarray([[1, 1], [1, 0], [1, 1], [1, 1]], bool)
    )
    batch = SimpleNamespace(weight=weight, token_ids=ids)
    named = jax.nn.one_hot(jnp.where(ids[:, 1:3] % 2 == 0, ids[:, 1:3], 0), 10)  # the others are taken for <s>
    model = SimpleNamespace(
        project_text=lambda x: x,
        project_image=lambda x, frames: x,
        contrastive=SimpleNamespace(temperature=jnp.ones([])),
        matching=lambda joint: joint,
        masked_language=lambda words: words,
        fusion=SimpleNamespace(joint=lambda fused: fused),
    )
    views = SimpleNamespace(texts={"full": None}, images={"full": None}, frames=1)
    fused = {"matching": other_or_pair, "language": SimpleNamespace(words=named)}
    monkeypatch.setattr(pretrain, "encode_views", lambda *_: views)
    monkeypatch.setattr(pretrain, "harden_partners", lambda masks, *_: masks)
    monkeypatch.setattr(pretrain, "fuse_pairs", lambda *_: fused)
    task = Pretraining({}, MaskSpec(60, 4), 16, {}, {})
    outputs = task.features(model, batch, masks, ("matching", "masked_language"), None)
    assert float(outputs.accuracies["matching"].mean()) == pytest.approx(2 / 3)
    assert float(outputs.accuracies["masked_language"].mean()) == pytest.approx(4 / 5)
    surprise = {"matching": [0, 0, 1], "masked_language": [0, 1, 0, 0, 0]}  # by how much the right logit is lower
    for name, classes in (("matching", 2), ("masked_language", 10)):
        right = np.log(np.e + classes - 1) - 1
        assert float(outputs.losses[name].mean()) == pytest.approx(right + np.mean(surprise[name]), rel=1e-5)
