"""Views encoded once give the losses and gradients of each objective encoding its own (dropout off).

To 1e-5, and in float64, so that nothing but a real difference can show: gradients here are as large as 10.
"""

from __future__ import annotations

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scl_jax.models import parameters
from scl_jax.models.fusion import FusionConfig
from scl_jax.models.layers import Precision
from scl_jax.models.scl import SCL, SCLConfig
from scl_jax.models.text import TextConfig
from scl_jax.models.vision import VisionConfig
from scl_jax.objectives.masks import MaskSpec
from scl_jax.objectives.views import OBJECTIVES
from scl_jax.tasks.pretrain import Pretraining, Ramp
from scl_jax.types import Batch

B, FRAMES, PIXELS, L, VOCAB = 4, 2, 32, 12, 60
WEIGHTS = dict(zip(OBJECTIVES, (0.5, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2), strict=True))
TASK = Pretraining(
    ramps={name: Ramp(weight) for name, weight in WEIGHTS.items()},
    masks=MaskSpec(VOCAB, mask_id=4, drop_ratio=0.5, group_size=2),
    patch_size=8,
    global_temperature=dict.fromkeys(("global_vision", "global_text"), 0.3),
    local_temperature=dict.fromkeys(("local_vision", "local_text"), 0.3),
)


def compiled(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def config_of(text_layers: int = 1, **dropout: float) -> SCLConfig:
    sizes = {"width": 16, "heads": 2, "mlp_width": 32}
    return SCLConfig(
        vision=VisionConfig(**sizes, layers=1, patch_size=8, image_size=PIXELS, max_frames=FRAMES),
        text=TextConfig(**sizes, layers=text_layers, vocab_size=VOCAB, max_positions=L + 2, **dropout),
        fusion=FusionConfig(**sizes, layers=2, **dropout),  # the first of which makes pairs of the views
        projection_width=8,
        precision=Precision(jnp.float64, jnp.float64),
    )


@lru_cache
def network():
    graph, _ = parameters.abstract(partial(SCL, config_of()))
    return graph, compiled(lambda: parameters.split(SCL(config_of(), nnx.Rngs(0)))[1])()


def make_batch() -> Batch:
    rng = np.random.default_rng(0)
    lengths, position = np.array([12, 9, 5, 3])[:, None], np.arange(L)[None]
    inside = (position > 0) & (position < lengths - 1)
    ids = np.where(inside, rng.integers(5, VOCAB, (B, L)), np.where(position >= lengths, 1, 2 * (position > 0)))
    return Batch(
        pixels=jnp.asarray(rng.normal(size=(B, FRAMES, PIXELS, PIXELS, 3))),
        token_ids=jnp.asarray(ids),
        token_mask=jnp.asarray(position < lengths),
        word_ids=jnp.asarray(np.where(inside, (position - 1) // 2, -1)),
        weight=jnp.ones(B),
        item_id=jnp.arange(B),
    )


@lru_cache
def computed(active: tuple[str, ...], side_by_side: bool = True):
    """(gradient of Σ weight · loss over the active objectives, their losses).

    `side_by_side`: the dropped view goes beside the others; with kernels it goes by itself.
    """
    with jax.enable_x64(True):
        graph, params = network()
        batch = make_batch()
        masks = compiled(TASK.draw_masks)(batch, jax.random.key(0))

        def total(params):
            model = parameters.merge(graph, params)
            model.vision.joins_views = model.fusion.joins_pairs = side_by_side
            outputs = TASK.features(model, batch, masks, active, None)
            losses = outputs.losses | TASK.whole_batch_losses(outputs.whole_batch)
            means = {name: loss.mean() for name, loss in losses.items()}
            return sum((WEIGHTS[name] * mean for name, mean in means.items()), jnp.zeros([])), means

        gradient, losses = compiled(jax.grad(total, has_aux=True))(params)
        return jax.tree.map(np.asarray, gradient), {name: float(loss) for name, loss in losses.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_the_same_loss_alone_as_among_all(name):
    _, together = computed(OBJECTIVES)
    _, alone = computed((name,))
    assert set(alone) == {name}
    assert alone[name] > 0
    assert alone[name] == pytest.approx(together[name], abs=1e-5)


def test_the_gradients_of_the_objectives_alone_add_up_to_that_of_all():
    together, losses = computed(OBJECTIVES)
    assert set(losses) == set(OBJECTIVES)
    alone = jax.tree.map(lambda *parts: sum(parts), *(computed((name,))[0] for name in OBJECTIVES))
    for path, expected in parameters.flatten(alone).items():
        np.testing.assert_allclose(parameters.flatten(together)[path], expected, atol=1e-5, err_msg=path)


def test_the_dropped_view_by_itself_gives_what_it_gives_beside_the_others():
    (gradient, losses), (expected_gradient, expected) = computed(OBJECTIVES, side_by_side=False), computed(OBJECTIVES)
    assert losses == pytest.approx(expected, abs=1e-12)
    for path, x in parameters.flatten(expected_gradient).items():
        np.testing.assert_allclose(parameters.flatten(gradient)[path], x, atol=1e-10, err_msg=path)


def test_every_parameter_learns_from_the_seven_objectives():
    gradient, _ = computed(OBJECTIVES)
    still = [path for path, x in parameters.flatten(gradient).items() if not np.abs(x).max() > 0]
    assert still == []


def test_every_dropout_has_a_key_of_its_own(monkeypatch):
    """With the same key two would drop the same places. Residuals have one rate, weights of attention the other."""
    drawn = []

    def bernoulli(key, probability, shape):
        jax.debug.callback(lambda key: drawn.append((probability, len(shape), *key.tolist())), jax.random.key_data(key))
        return jnp.ones(shape, bool)

    monkeypatch.setattr("scl_jax.models.dropout.bernoulli", bernoulli)
    config = config_of(text_layers=2, dropout=0.25, attention_dropout=0.125)

    @compiled
    def run(key, params):  # nothing of the network is returned, so that little is compiled
        model = parameters.merge(graph, params)
        model.fusion.joins_pairs = False  # two passes of the fusion encoder
        TASK.features(model, make_batch(), TASK.draw_masks(make_batch(), key), ("global_text",), key)

    with jax.enable_x64(True):
        graph, shapes = parameters.abstract(partial(SCL, config))
        run(jax.random.key(0), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        jax.effects_barrier()
    assert len(set(drawn)) == len(drawn)
    residuals = [axes for probability, axes, *_ in drawn if probability == 0.75]
    attentions = [axes for probability, axes, *_ in drawn if probability == 0.875]
    assert residuals == [3] * (1 + 2 * 2 + 2 * 2 * 2 * 3)  # embedding; two or three sub-layers a layer and stream
    assert len(attentions) >= 2 + 2 * 2 * 2 * 2 and set(attentions) == {4}
    assert len(residuals) + len(attentions) == len(drawn)
