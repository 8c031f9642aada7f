"""Dropout whose random bits cost little: a counter-based generator that compiles into the loop that uses them.

`jax.random` on a CPU runs its rounds one after the other over arrays in memory: 12 ns a number on one machine, more
than the matrix products around them. Here every element hashes its own place, and nothing but the result is stored.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry_2x32(
    key: tuple[UInt32[Array, ""], UInt32[Array, ""]], first: UInt32[Array, "*S"], second: UInt32[Array, "*S"]
) -> tuple[UInt32[Array, "*S"], UInt32[Array, "*S"]]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011): two words of a counter → two random words."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = first + keys[0], second + keys[1]
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x = x + keys[(block + 1) % 3]
        y = y + (keys[(block + 2) % 3] + jnp.uint32(block + 1))
    return x, y


def bernoulli(key: Key[Array, ""], probability: float, shape: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """True with `probability`, decided by the key and an element's place alone: the same however it is sharded.

    The counter is (row, place in the row), so that rows of up to 2³² elements are told apart.
    """
    words = jax.random.key_data(key)
    rows = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) if shape else jnp.zeros(shape, jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(1, len(shape)):
        place = place * jnp.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits, _ = threefry_2x32((words[..., 0], words[..., 1]), rows, place)
    return bits < jnp.uint32(min(round(probability * 2**32), 2**32 - 1))


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Inverted dropout; the identity without a key or at rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x * (1.0 / (1.0 - rate)), 0.0).astype(x.dtype)
