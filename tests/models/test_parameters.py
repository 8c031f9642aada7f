"""What a network is made of, without its numbers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scl_jax.models import parameters
from scl_jax.models.heads import Classifier
from scl_jax.models.layers import Precision


def made(width: int = 8, **precision) -> partial:
    return partial(Classifier, width, 4, 3, Precision(**precision))


def test_shapes_are_those_of_the_network_itself():
    graph, shapes = parameters.abstract(made())
    _, params = parameters.split(made()(nnx.Rngs(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    scores = parameters.merge(graph, params)(jnp.ones((2, 8)))
    np.testing.assert_array_equal(scores, made()(nnx.Rngs(0))(jnp.ones((2, 8))))


def test_what_is_changed_by_one_caller_is_whole_for_the_next():
    first = parameters.abstract(made())[1]
    names = set(parameters.flatten(first))
    first["out"].clear()
    first["more"] = first.pop("norm")
    assert set(parameters.flatten(parameters.abstract(made())[1])) == names


@pytest.mark.parametrize("other", [{"width": 16}, {"param_dtype": jnp.bfloat16}])
def test_other_sizes_and_types_are_told_apart(other):
    one, two = (parameters.flatten(parameters.abstract(made(**kind))[1]) for kind in ({}, other))
    kernel = "dense.kernel"
    assert (one[kernel].shape, one[kernel].dtype) != (two[kernel].shape, two[kernel].dtype)


def test_float64_is_told_apart_by_whether_it_is_allowed():
    def dtype():
        return parameters.abstract(made(param_dtype=jnp.float64))[1]["dense"]["kernel"].dtype

    with pytest.warns(UserWarning, match="float64"):
        assert dtype() == jnp.float32
    with jax.enable_x64(True):
        assert dtype() == jnp.float64


def test_a_network_is_made_once():
    seen = []

    class Counted(Classifier):
        def __init__(self, *sizes):
            seen.append(sizes[:-1])
            super().__init__(*sizes)

    for _ in range(3):
        parameters.abstract(partial(Counted, 8, 4, 3, Precision()))
    assert len(seen) == 1


def test_named_sizes_count_too():
    def network(width, rngs, *, classes):
        return Classifier(width, 4, classes, Precision(), rngs)

    shapes = (parameters.abstract(partial(network, 8, classes=n))[1]["out"]["kernel"].shape for n in (3, 5, 3))
    assert list(shapes) == [(4, 3), (4, 5), (4, 3)]
