"""Dropout whose random bits cost little: a hash of an element's place, computed in the loop that uses it.

`jax.random` on a CPU runs its rounds one after the other over arrays in memory, 12 ns a number on one machine, as
much as the matrix products around it. Its rounds written out compile for minutes. Dropout needs neither: two turns
of a 32-bit mixing function with good avalanche, from keys that `jax.random` has split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32


def mix(x: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
    """lowbias32: a bijection of words in which every bit depends on every other (C. Wellons, hash-prospector)."""
    return halve(multiply(halve(x)))


def halve(x: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
    """The upper half of each word, added without carry to its lower half; twice is nothing."""
    return x ^ (x >> 16)


def multiply(x: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
    """The steps of `mix` in which bits reach others above them."""
    x = x * jnp.uint32(0x7FEB352D)
    return (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)


def bernoulli(key: Key[Array, ""], probability: float, shape: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """True with `probability`, decided by the key and an element's place alone: the same however it is sharded.

    A row (the first axis) has two words of its own, made from the key; its elements are told apart by their place in
    it, up to 2³² of them.
    """
    row = jnp.zeros(shape, jnp.uint32)
    if shape:
        row = jax.lax.broadcasted_iota(jnp.uint32, (shape[0], *[1] * (len(shape) - 1)), 0)
    return kept(places(shape, 1), *row_words(key, row), probability)


def places(shape: tuple[int, ...], first_axis: int = 0) -> UInt32[Array, "*shape"]:
    """Each element's place among those that differ from it in the axes from `first_axis` on, the last one fastest."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(first_axis, len(shape)):
        place = place * jnp.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def row_words(key: Key[Array, ""], row: UInt32[Array, "*S"]) -> tuple[UInt32[Array, "*S"], UInt32[Array, "*S"]]:
    """The two words of each row."""
    words = jax.random.key_data(key)
    return mix(row ^ words[0]), mix(mix(row ^ words[-1]) + jnp.uint32(0x9E3779B9))


def sample_words(key: Key[Array, ""] | None, rows: int) -> UInt32[Array, "rows 2"]:
    """The two words of each of the first `rows` rows, side by side; zeros without a key."""
    if key is None:
        return jnp.zeros((rows, 2), jnp.uint32)
    return jnp.stack(row_words(key, jnp.arange(rows, dtype=jnp.uint32)), axis=1)


def kept(
    place: UInt32[Array, "*S"], first: UInt32[Array, "..."], second: UInt32[Array, "..."], probability: float
) -> Bool[Array, "*S"]:
    """Whether the elements at these places of rows with these words are kept.

    By `mix(mix(place + first) ^ second)`, without what cancels: the last step of the inner `mix` and the first of the
    outer one, but for the bits of `second`; and without the outer one's last step, which changes the lower half alone.
    """
    bits = multiply(multiply(halve(place + first)) ^ halve(second))
    return bits < jnp.uint32(min(round(probability * 2**32), 2**32 - 1))


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Inverted dropout; the identity without a key or at rate 0."""
    if key is None or rate == 0.0:
        return x
    return drop(x, bernoulli(key, 1.0 - rate, x.shape), rate)


def drop(x: Float[Array, "*S"], keep: Bool[Array, "*S"], rate: float) -> Float[Array, "*S"]:
    """`x / (1 - rate)` where `keep`, 0 elsewhere."""
    return jnp.where(keep, x * (1.0 / (1.0 - rate)), 0.0).astype(x.dtype)
