"""A scanned stack of layers, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from scl_jax.partition import split_batch

REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nnx.Module):
    """`depth` layers of one kind: parameters carry a leading layer axis, the forward pass is one scan.

    `remat`: "none" keeps every activation for the backward pass, "dots" only the results of matrix products with
    weights, "full" only the input of each layer. `unroll`: layers a turn of the loop.
    """

    def __init__(
        self, make_layer: Callable[[nnx.Rngs], nnx.Module], depth: int, remat: str, rngs: nnx.Rngs, unroll: int = 1
    ):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0, axis_size=depth)
        def make(rngs: nnx.Rngs):
            return make_layer(rngs)

        self.each: Any = make(rngs)
        self.depth = depth
        self.remat, self.unroll = remat, unroll

    def __call__(
        self,
        x: Any,
        apply: Callable,
        key: Key[Array, ""] | None = None,
        return_layers: bool = False,
        first: Callable | None = None,
        last: Callable | None = None,
    ) -> Any:
        """Runs `x = apply(layer, x, key)` for each layer; also returns every layer's output if asked to.

        Args:
            x: a pytree of arrays, the same structure before and after a layer.
            apply: called with the layer, the state and that layer's dropout key (None without `key`).
            return_layers: also give the outputs of all layers, stacked on a leading axis; not with `first` or `last`.
            first: called instead of `apply` for the first layer, whose input may have other shapes.
            last: called instead of `apply` for the last layer, whose output may have other shapes.
        """
        graph, parameters = nnx.split(self.each)
        keys = None if key is None else jax.random.split(key, self.depth)

        def run(apply: Callable, x, xs):
            layer_parameters, layer_key = xs
            return split_batch(apply(nnx.merge(graph, layer_parameters), x, layer_key))

        def with_remat(function: Callable, prevent_cse: bool = False) -> Callable:
            if self.remat == "none":
                return function
            return jax.checkpoint(function, policy=REMAT_POLICIES[self.remat], prevent_cse=prevent_cse)

        def body(carry, xs):
            y = run(apply, carry, xs)
            return y, (y if return_layers else None)

        x = split_batch(x)
        head, middle, tail = split_ends((parameters, keys), self.depth, first is not None, last is not None)
        if first is not None:
            # outside of a loop XLA would find its second computation to be the first, and keep all that it gave
            x = with_remat(partial(run, first), prevent_cse=True)(x, head)
        x, layers = jax.lax.scan(with_remat(body, prevent_cse=self.unroll > 1), x, middle, unroll=self.unroll)
        if last is not None:
            x = with_remat(partial(run, last))(x, tail)
        return (x, layers) if return_layers else x


def split_ends(tree: Any, depth: int, first: bool, last: bool) -> tuple[Any, Any, Any]:
    """Leaves (depth, …) → (…) of the first layer if asked for, (layers, …) of the middle, (…) of the last likewise.

    Gradients of the parts are put together by one concatenation.
    """
    sizes = [1] * first + [depth - first - last] + [1] * last

    def split(x: Array) -> Sequence[Array]:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.split(x, list(accumulate(sizes))[:-1])
        return jax.lax.split(x, sizes)

    leaves, structure = jax.tree.flatten(tree)
    parts = [split(x) for x in leaves]

    def layer(place: int) -> Any:
        return structure.unflatten([part[place][0] for part in parts])

    middle = structure.unflatten([part[int(first)] for part in parts])
    return layer(0) if first else None, middle, layer(-1) if last else None
