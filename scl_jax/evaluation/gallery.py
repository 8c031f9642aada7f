"""Encoded texts and items of a gallery, kept where pairs are scored.

Rows lie on every device where they fit, so that a batch of pairs is a list of numbers and not a copy of its tokens;
a larger gallery stays on the host. Nothing waits for a batch: work is queued, at most `IN_FLIGHT` batches ahead.

Axes: R rows of a gallery, B rows of a batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from scl_jax.training.sharding import replicated, whole

IN_FLIGHT = 2  # batches that are queued before the oldest is waited for
SHARE = 0.4  # of a device's free memory that a gallery may take, twice over while it is put together


class Rows:
    """Arrays (R, …) of equal R, taken by row number: `on_device` says where they are.

    Args:
        parts: the arrays of every batch, one after the other; rows past `count` are padding.
        mesh: the devices that get them, whole, where they fit.
        budget: bytes of a device that they may take; None: a share of what is free.
    """

    def __init__(self, parts: Sequence[tuple[Array, ...]], count: int, mesh: Mesh, budget: int | None = None):
        self.count = count
        needed = sum(x.nbytes for part in parts for x in part)
        self.on_device = needed <= (free_bytes(mesh) if budget is None else budget)
        if self.on_device:
            join = joining(mesh)
            self.arrays: tuple[Any, ...] = tuple(join(column) for column in zip(*parts, strict=True))
        else:
            self.arrays = tuple(
                np.concatenate([whole(x) for x in column])[:count] for column in zip(*parts, strict=True)
            )

    def on_host(self) -> tuple[np.ndarray, ...]:
        """The arrays as NumPy, without padding."""
        return tuple(np.asarray(x)[: self.count] for x in self.arrays)


@cache  # a function made anew is compiled anew, at every evaluation
def joining(mesh: Mesh) -> Callable[[Sequence[Array]], Array]:
    """Arrays (R_i, …) → (Σ R_i, …) on every device of the mesh."""
    return jax.jit(jnp.concatenate, out_shardings=replicated(mesh))


def free_bytes(mesh: Mesh) -> float:
    """Bytes of the first device of this process that a gallery may take; without limit where nothing is known."""
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return float("inf")
    return SHARE * (stats["bytes_limit"] - stats["bytes_in_use"])


def queued(batches: Iterable[Any], run: Callable[[Any], Any]) -> list[Any]:
    """`run` of every batch, without waiting for any but the one that lies `IN_FLIGHT` back."""
    results = []
    for batch in batches:
        results.append(run(batch))
        if len(results) > IN_FLIGHT:
            jax.block_until_ready(results[-1 - IN_FLIGHT])
    return results
