"""Scores of heads are compared with each other: a network in bfloat16 must not make them equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scl_jax.inference.weights import read_weights
from scl_jax.models import parameters
from scl_jax.models.heads import Classifier, MatchingHead, scoring
from scl_jax.models.layers import Precision

WIDTH, ROWS = 32, 512
MAKERS = {
    "rank": lambda precision, rngs: scoring(2 * WIDTH, 1, precision, rngs),
    "matching": lambda precision, rngs: MatchingHead(WIDTH, precision, rngs),
    "classifier": lambda precision, rngs: Classifier(2 * WIDTH, WIDTH, 3, precision, rngs),
}


@pytest.mark.parametrize("head", MAKERS)
def test_scores_of_a_network_in_bfloat16_have_no_ties(head):
    joint = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 2 * WIDTH)), jnp.bfloat16)
    scores = jax.jit(MAKERS[head](Precision(dtype=jnp.bfloat16), nnx.Rngs(0)))(joint)
    assert scores.dtype == jnp.float32
    assert len(np.unique(scores[:, 0])) > 0.98 * ROWS  # in bfloat16 a third of them


@pytest.mark.parametrize("head", MAKERS)
def test_the_gradient_of_a_score_has_the_type_of_activations(head):
    joint = jnp.ones((2, 2 * WIDTH), jnp.bfloat16)
    network = MAKERS[head](Precision(dtype=jnp.bfloat16), nnx.Rngs(0))
    assert jax.eval_shape(jax.grad(lambda x: network(x).sum()), joint).dtype == jnp.bfloat16


def test_heads_of_a_loaded_model_are_wide(tiny_run):
    graph, params = parameters.abstract(read_weights(str(tiny_run), dtype="bfloat16").make)
    joint = jax.ShapeDtypeStruct((2, 32), jnp.bfloat16)  # its width is 16

    def scores(params, joint):
        model = parameters.merge(graph, params)
        return model.rank(joint), model.matching(joint), model.vqa(joint), model.entailment(joint)

    assert {x.dtype for x in jax.eval_shape(scores, params, joint)} == {jnp.dtype(jnp.float32)}
