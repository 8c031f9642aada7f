"""A model as a static graph and a plain pytree of parameters, and dotted names for those parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
from flax import nnx, traverse_util

Params = dict[str, Any]  # nested dictionaries of arrays


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The static graph and the nested dictionary of parameters; `merge` undoes it."""
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def merge(graph: nnx.GraphDef, params: Params) -> Any:
    """The model with these parameters."""
    return nnx.merge(graph, params)


def abstract(make: partial[Any]) -> tuple[nnx.GraphDef, Params]:
    """Graph and parameters of `make(rngs)` as shapes and types only: nothing is computed.

    `make` is a partial of sizes, all hashable, such as `partial(SCL, sizes)`: building a network takes part of a
    second even without its numbers, so what came of the same sizes before is given again.
    """
    named = tuple(make.keywords.items())
    graph, shapes = _abstract(make.func, make.args, named, jax.config.read("jax_enable_x64"))
    return graph, jax.tree.map(lambda x: x, shapes)  # dictionaries of the caller's own


@lru_cache(maxsize=64)
def _abstract(make: Callable[..., nnx.Module], sizes: tuple, named: tuple, x64: bool) -> tuple[nnx.GraphDef, Params]:
    graph, state = nnx.split(nnx.eval_shape(lambda: make(*sizes, nnx.Rngs(0), **dict(named))))
    return graph, nnx.to_pure_dict(state)


def flatten(params: Params) -> dict[str, Any]:
    """Nested dictionaries → {"text.word_embedding.embedding": array, …}."""
    return {".".join(path): value for path, value in traverse_util.flatten_dict(params).items()}


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Undoes `flatten`."""
    return traverse_util.unflatten_dict({tuple(path.split(".")): value for path, value in flat.items()})


def count(params: Params) -> int:
    """How many numbers."""
    return sum(x.size for x in jax.tree.leaves(params))
