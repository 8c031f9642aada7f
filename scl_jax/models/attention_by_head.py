"""Attention a few heads at a time, for CPUs: their logits and weights never leave the processor's cache.

For all heads at once these are arrays of 119 MB (four views of a clip of 788 tokens), which are written to memory and
read back at every step of the computation. Here a loop takes them block by block, and the backward pass computes them
again instead of keeping them. Formulas, numbers and dropout masks are those of `models/attention.py:plain_attention`.

Axes: B batch, Q queries, K keys, T either, H heads, d width of a head; N blocks of h heads of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from scl_jax.models.dropout import drop, kept, places, sample_words
from scl_jax.partition import by_sample

WORTHWHILE = 32_768  # logits of a head; with far fewer there is little to gain (benchmarks/RESULTS.md)
BLOCK = 327_680  # logits of a block, if it is more than one head: 1.25 MiB in float32


def attention_by_head(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    dropout_rate: float,
    dropout_key: Key[Array, ""] | None,
) -> Float[Array, "B Q H d"]:
    """softmax(q·k) · v with dropout on its weights; `query` is divided by √d already."""
    rate = 0.0 if dropout_key is None else dropout_rate
    return attention(rate, query, key, value, sample_words(dropout_key, query.shape[0]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(rate: float, query, key, value, words: UInt32[Array, "B 2"]) -> Float[Array, "B Q H d"]:
    """The same; `words` are those of each sample's dropout mask."""
    return attention_forward(rate, query, key, value, words)[0]


def attention_forward(rate: float, query, key, value, words):
    """The output, and what the backward pass needs: beside the inputs two numbers a query and head."""
    y, largest, inverse = by_sample(partial(forward, rate), query, key, value, words)
    return y, (query, key, value, words, y, largest, inverse)


def attention_backward(rate: float, kept_arrays, gradient):
    """Gradients of query, key and value."""
    query, key, value, words, y, largest, inverse = kept_arrays
    gradient = gradient * inverse
    along = (gradient * y).sum(axis=-1, keepdims=True)
    gradient = gradient.astype(value.dtype)
    return *by_sample(partial(backward, rate), query, key, value, words, gradient, along, largest), None


attention.defvjp(attention_forward, attention_backward)


# ---- of the samples of one device ----


def forward(rate: float, query, key, value, words):
    """Output (B, Q, H, d); of each query's logits the largest, and 1 / Σ exp(logit - largest), both (B, Q, H, 1)."""
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def of_block(place, query, key, value):
        logits = jnp.einsum("hqd,hkd->hqk", query, key, preferred_element_type=wide)
        largest = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        inverse = 1.0 / weights.sum(axis=-1, keepdims=True)
        dropped = dropout_of_block(rate, weights.shape, place)(weights).astype(value.dtype)
        y = jnp.einsum("hqk,hkd->hqd", dropped, value, preferred_element_type=wide)
        return (y * inverse).astype(value.dtype), largest, inverse

    return block_by_block(of_block, words, query, key, value)


def backward(rate: float, query, key, value, words, gradient, along, largest):
    """∂q, ∂k and ∂v; `gradient` is ∂o / z, `along` (∂o / z)·o."""
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def of_block(place, query, key, value, gradient, along, largest):
        weights = jnp.exp(jnp.einsum("hqd,hkd->hqk", query, key, preferred_element_type=wide) - largest)
        dropout = dropout_of_block(rate, weights.shape, place)
        of_weights = jnp.einsum("hqd,hkd->hqk", gradient, value, preferred_element_type=wide)
        of_logits = (weights * (dropout(of_weights) - along)).astype(query.dtype)
        query_gradient = jnp.einsum("hqk,hkd->hqd", of_logits, key)
        key_gradient = jnp.einsum("hqk,hqd->hkd", of_logits, query)
        value_gradient = jnp.einsum("hqk,hqd->hkd", dropout(weights).astype(value.dtype), gradient)
        return query_gradient, key_gradient, value_gradient

    return block_by_block(of_block, words, query, key, value, gradient, along, largest)


# ---- blocks ----


def block_by_block(of_block: Callable, words, query, key, *others) -> tuple[Array, ...]:
    """`of_block(place, query, key, *others)` for each block, one after the other; arrays (B, T, H, d) on both sides.

    It gets and gives parts (h, T, d), and the `place` that `dropout_of_block` asks for.
    """
    size = heads_of_block(query, key)
    parts = [into_blocks(x, size) for x in (query, key, *others)]
    found = jax.lax.map(lambda xs: of_block(*xs), (places_of_blocks(query, key, words, size), *parts))
    return tuple(from_blocks(x, len(query)) for x in found)


def heads_of_block(query: Float[Array, "B Q H d"], key: Float[Array, "B K H d"]) -> int:
    """The largest divisor of H that keeps a block within `BLOCK` logits, at least 1."""
    area, heads = query.shape[1] * key.shape[1], query.shape[2]
    return max(size for size in range(1, heads + 1) if heads % size == 0 and (size == 1 or size * area <= BLOCK))


def into_blocks(x: Float[Array, "B T H d"], size: int) -> Float[Array, "N h T d"]:
    """Blocks of `size` heads of one sample each."""
    b, tokens, heads, width = x.shape
    return x.swapaxes(1, 2).reshape(b * heads // size, size, tokens, width)


def from_blocks(x: Float[Array, "N h T d"], batch: int) -> Float[Array, "B T H d"]:
    """Undoes `into_blocks`."""
    return x.reshape(batch, -1, *x.shape[2:]).swapaxes(1, 2)


def places_of_blocks(query, key, words, size: int) -> tuple[UInt32[Array, "N 2"], UInt32[Array, " N"]]:
    """For dropout: the words of each block's sample, and the place of the block's first weight in that sample."""
    blocks = query.shape[2] // size
    first = jnp.arange(blocks, dtype=jnp.uint32) * jnp.uint32(size * query.shape[1] * key.shape[1])
    return jnp.repeat(words, blocks, axis=0), jnp.tile(first, len(words))


def dropout_of_block(rate: float, shape: tuple[int, ...], place) -> Callable:
    """Dropout for arrays of that shape, all by one mask."""
    if rate == 0.0:
        return lambda x: x
    (first_word, second_word), first = place
    keep = kept(places(shape) + first, first_word, second_word, 1.0 - rate)
    return lambda x: drop(x, keep, rate)
