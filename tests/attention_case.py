"""Random inputs of attention, and its output and gradients, for the tests of the kernels."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def inputs(queries: int, keys: int, heads: int, width: int, batch: int = 3) -> list[jax.Array]:
    """Query, key, value, and the weights of the output's sum."""
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, width) for n in (queries, keys, keys, queries)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def run(attention: Callable, arrays: Sequence[jax.Array], mask: jax.Array | None, rate: float) -> tuple:
    """Output, and gradients of query, key and value."""
    *qkv, weight = arrays

    def loss(query, key, value):
        y = attention(query, key, value, mask, rate)
        return jnp.sum(y * weight), y

    gradient, y = jax.grad(loss, (0, 1, 2), has_aux=True)(*qkv)
    return y, *gradient
