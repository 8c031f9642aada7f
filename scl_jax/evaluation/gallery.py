"""Encoded texts and items of a gallery, kept where pairs are scored.

Rows lie on every device where they fit, so that a batch of pairs is a list of numbers and not a copy of its tokens;
a larger gallery stays on the host. Nothing waits for a batch: work is queued, at most `IN_FLIGHT` batches ahead.

Axes: R rows of a gallery, B rows of a batch, N tokens, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        parts: the arrays of every batch, one after the other; rows past `count` are padding. What a device cannot take
            is moved to the host as it comes.
        mesh: the devices that get them, whole, where they fit.
        budget: bytes of a device that they may take; None: a share of what is free before the first part is made.
    """

    def __init__(self, parts: Iterable[tuple[Array, ...]], count: int, mesh: Mesh, budget: float | None = None):
        self.count = count
        allowed = free_bytes(mesh) if budget is None else budget
        kept: list[tuple[Any, ...]] = []
        needed, self.on_device = 0, True
        for part in parts:
            needed += sum(x.nbytes for x in part)
            if self.on_device and needed > allowed:
                self.on_device, kept = False, [whole(earlier) for earlier in kept]
            kept.append(part if self.on_device else whole(part))
        columns = zip(*kept, strict=True)
        if self.on_device:
            join = joining(mesh)
            self.arrays: tuple[Any, ...] = tuple(join(column) for column in columns)
        else:
            self.arrays = tuple(np.concatenate(column)[:count] for column in columns)

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


def queued(batches: Iterable[Any], run: Callable[[Any], Any]) -> Iterator[Any]:
    """`run` of every batch, in order, without waiting for any but the one that lies `IN_FLIGHT` back.

    A result is given out when it is there, so that whoever takes it may move it or let it go.
    """
    under_way: deque[Any] = deque()
    for batch in batches:
        under_way.append(run(batch))
        if len(under_way) > IN_FLIGHT:
            yield jax.block_until_ready(under_way.popleft())
    yield from under_way
