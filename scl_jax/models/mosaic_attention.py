"""Attention in one kernel, dropout included, for TPUs: Pallas, compiled by Mosaic.

Logits, weights and dropout masks (those of `models/dropout.py`, the same as `plain_attention`'s) stay in the chip's
fast memory, and arrays stay as matrix products give and take them, heads side by side along the last axis. A vector of
a TPU has 128 numbers, so that kernels see the heads that fill one, two of 64. A head is picked by zeros in the lanes
of the others: a product over 128 lanes takes as long as one over 64, and nothing is cut or moved.

With logits l = q·k / √d, w = exp(l - max l) / Σ exp(l - max l), m the dropout mask over its probability, ∂o the
output's gradient:

    o = Σ m·w·v      ∂v = Σ m·w·∂o      ∂l = w·(m·∂o·v - δ),  δ = Σ w·m·∂o·v      ∂q = Σ ∂l·k/√d      ∂k = Σ ∂l·q/√d

All keys of a query are there at once, so the backward pass needs q, k and v alone.

Axes: B batch, Q queries, K keys, H heads, d width of a head, D = H·d, L lanes of a block (whole heads).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from scl_jax.models.dropout import drop, kept, sample_words
from scl_jax.models.layers import key_lengths
from scl_jax.partition import by_sample

LANES = 128
# of the fast memory 16 MiB are for all that a kernel holds
MOST_KEYS = 2400  # more do not fit, backward
BLOCK = 320_000  # logits of a block at most: 1.2 MiB in float32
ROWS = 512  # queries of a block at most
TILE = 16  # rows of a tile in bfloat16


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernels compute."""

    heads: int
    rate: float
    interpret: bool = False  # run as ordinary operations, for tests without a TPU


def mosaic_attention(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    key_mask: Bool[Array, "B K"] | None,
    dropout_rate: float,
    dropout_key: Key[Array, ""] | None,
    interpret: bool = False,
) -> Float[Array, "B Q H d"]:
    """Multi-head scaled dot-product attention with dropout on its weights, to at most `MOST_KEYS` keys.

    `key_mask`: real keys first, then padding. A row without any real key reads its first key.
    """
    plan = Plan(key.shape[2], dropout_rate if dropout_key is not None else 0.0, interpret)
    lengths, words = key_lengths(key, key_mask), sample_words(dropout_key, key.shape[0])
    query_rows, key_rows, value_rows = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    y: Array = attention(plan, query_rows, key_rows, value_rows, lengths, words)
    return y.reshape(query.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    plan: Plan,
    query: Float[Array, "B Q D"],
    key: Float[Array, "B K D"],
    value: Float[Array, "B K D"],
    lengths: Int[Array, " B"],
    words: UInt32[Array, "B 2"],
) -> Float[Array, "B Q D"]:
    """Attention to the first `lengths` keys of each sample; `words` are those of its dropout mask."""
    return by_sample(partial(call_forward, plan), query, key, value, lengths, words)


def attention_forward(plan: Plan, *arrays):
    """The output, and what the backward pass needs: the inputs."""
    return attention(plan, *arrays), arrays


def attention_backward(plan: Plan, arrays, gradient):
    """Gradients of query, key and value."""
    query, key, value, lengths, words = arrays
    return *by_sample(partial(call_backward, plan), query, key, value, gradient, lengths, words), None, None


attention.defvjp(attention_forward, attention_backward)


# ---- calls: one instance of a kernel for each block of queries, of heads, of samples ----


def call_forward(plan: Plan, query, key, value, lengths, words):
    """Output (B, Q, D)."""
    call = Call(plan, query, key)
    ins = [(query, call.of_queries), (key, call.of_keys), (value, call.of_keys)]
    return call(forward_kernel, "attention_forward", 2, ins, [(query, call.of_queries)], lengths, words)[0]


def call_backward(plan: Plan, query, key, value, gradient, lengths, words):
    """∂q, ∂k and ∂v."""
    call = Call(plan, query, key)
    ins = [(query, call.of_queries), (key, call.of_keys), (value, call.of_keys), (gradient, call.of_queries)]
    outs = [(query, call.of_queries), (key, call.of_keys), (value, call.of_keys)]
    sums = [pltpu.VMEM((key.shape[1], call.lanes), jnp.float32)] * 2
    return call(backward_kernel, "attention_backward", 4, ins, outs, lengths, words, sums)


class Call:
    """How arrays are cut into blocks."""

    def __init__(self, plan: Plan, query: Array, key: Array):
        self.plan = plan
        self.batch, self.queries, width = query.shape
        self.keys, self.head_width = key.shape[1], width // plan.heads
        self.lanes = block_lanes(width, self.head_width)
        self.rows = block_rows(self.queries, self.keys)
        self.grid = (self.batch, width // self.lanes, pl.cdiv(self.queries, self.rows))
        self.of_queries = pl.BlockSpec((1, self.rows, self.lanes), lambda row, lanes, block: (row, block, lanes))
        self.of_keys = pl.BlockSpec((1, self.keys, self.lanes), lambda row, lanes, block: (row, 0, lanes))

    def __call__(self, kernel: Any, name: str, products: int, ins, outs, lengths, words, scratch=()) -> Any:
        """Runs a kernel; `ins` and `outs` are (array or its like, block), `products` those of size Q · K · d a head."""
        of_scalars = [pl.BlockSpec(memory_space=pltpu.SMEM)] * 3  # of one axis each: rows of two would be padded
        size = self.batch * self.plan.heads * self.queries * self.keys
        moved = sum(x.size * x.dtype.itemsize for x, _ in [*ins, *outs])
        return pl.pallas_call(
            partial(kernel, call=self),
            grid=self.grid,
            in_specs=[*(block for _, block in ins), *of_scalars],
            out_specs=[block for _, block in outs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outs],
            scratch_shapes=list(scratch),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * size * self.head_width, transcendentals=size, bytes_accessed=moved
            ),
            interpret=self.plan.interpret,
            name=name,
        )(*(x for x, _ in ins), lengths, words[:, 0], words[:, 1])


def block_lanes(width: int, head_width: int) -> int:
    """Lanes of a block: whole heads that fill vectors, all of them where that does not come out even."""
    lanes = max(LANES, head_width)
    return lanes if width % lanes == 0 and lanes % head_width == 0 and lanes % LANES == 0 else width


def block_rows(queries: int, keys: int) -> int:
    """Queries of a block: all, or equal parts in whole tiles."""
    parts = max(pl.cdiv(queries * keys, BLOCK), pl.cdiv(queries, ROWS))
    return queries if parts == 1 else pl.cdiv(pl.cdiv(queries, parts), TILE) * TILE


# ---- kernels ----


class Head:
    """The weights of one head of a block."""

    def __init__(self, call: Call, number: int, lengths: Any, words_0: Any, words_1: Any):
        row, blocks, block = (pl.program_id(axis) for axis in range(3))
        self.call = call
        self.length = lengths[row]
        self.words = words_0[row], words_1[row]
        self.first_lane = number * call.head_width
        head = blocks * (call.lanes // call.head_width) + number
        self.first_place = (head * call.queries + block * call.rows) * call.keys
        self.shape = (call.rows, call.keys)
        self.scale = call.head_width**-0.5

    def own(self, x: Float[Array, "N L"]) -> Float[Array, "N L"]:
        """`x` in the lanes of this head, zeros in others."""
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) - self.first_lane
        return jnp.where((lane >= 0) & (lane < self.call.head_width), x, 0.0).astype(x.dtype)

    def weights(
        self, query: Float[Array, "Q L"], key: Float[Array, "K L"]
    ) -> tuple[Float[Array, "Q K"], Float[Array, "Q 1"]]:
        """exp(l - max l), and its sum (Q, 1)."""
        column = jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
        logits = jnp.where(column < self.length, times_transposed(self.own(query), key) * self.scale, -jnp.inf)
        weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
        return weights, weights.sum(axis=1, keepdims=True)

    def keep(self) -> Bool[Array, "Q K"] | None:
        """Which weights dropout keeps."""
        if not self.call.plan.rate:
            return None
        row, column = (jax.lax.broadcasted_iota(jnp.int32, self.shape, axis) for axis in (0, 1))
        place = self.first_place + row * self.call.keys + column
        return kept(place.astype(jnp.uint32), *self.words, 1.0 - self.call.plan.rate)

    def drop(self, x: Float[Array, "Q K"], keep: Bool[Array, "Q K"] | None) -> Float[Array, "Q K"]:
        """`x` over the probability of keeping where weights are kept, else 0."""
        return x if keep is None else drop(x, keep, self.call.plan.rate)


def product(left: Array, right: Array, left_axis: int, right_axis: int) -> Float[Array, "_ _"]:
    """The sum of products along these axes, in float32."""
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def times_transposed(left: Float[Array, "M L"], right: Float[Array, "N L"]) -> Float[Array, "M N"]:
    """left · rightᵀ."""
    return product(left, right, 1, 1)


def forward_kernel(q_ref, k_ref, v_ref, lengths, words_0, words_1, y_ref, *, call: Call):
    """A block of queries, head by head."""
    query, key, value = q_ref[0], k_ref[0], v_ref[0]
    y = jnp.zeros(query.shape, jnp.float32)
    for number in range(call.lanes // call.head_width):
        head = Head(call, number, lengths, words_0, words_1)
        weights, z = head.weights(query, key)
        dropped = head.drop(weights, head.keep()).astype(value.dtype)
        y += head.own(product(dropped, value, 1, 0) / z)
    y_ref[0] = y.astype(y_ref.dtype)


def backward_kernel(
    q_ref, k_ref, v_ref, dy_ref, lengths, words_0, words_1, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum, *, call: Call
):
    """∂q of a block of queries, and its part of ∂k and ∂v, which add up from block to block."""
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    # rows behind the last query hold anything; zeros keep them out of the sums
    inside = block * call.rows + jax.lax.broadcasted_iota(jnp.int32, (call.rows, call.lanes), 0) < call.queries
    query, dy = (jnp.where(inside, ref[0], 0.0).astype(ref.dtype) for ref in (q_ref, dy_ref))
    key, value = k_ref[0], v_ref[0]
    dq, dk, dv = (jnp.zeros((n, call.lanes), jnp.float32) for n in (call.rows, call.keys, call.keys))
    for number in range(call.lanes // call.head_width):
        head = Head(call, number, lengths, words_0, words_1)
        weights, z = head.weights(query, key)
        weights, keep = weights / z, head.keep()
        of_weights = head.drop(times_transposed(head.own(dy), value), keep)
        of_logits = weights * (of_weights - (weights * of_weights).sum(axis=1, keepdims=True))
        of_logits = (of_logits * head.scale).astype(query.dtype)
        dropped = head.drop(weights, keep).astype(dy.dtype)
        dq += head.own(product(of_logits, key, 1, 0))
        dk += head.own(product(of_logits, query, 0, 0))
        dv += head.own(product(dropped, dy, 0, 0))
    dq_ref[0] = dq.astype(dq_ref.dtype)
    dk_sum[...] += dk
    dv_sum[...] += dv

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        dk_ref[0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)
