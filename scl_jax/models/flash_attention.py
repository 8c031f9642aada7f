"""Attention in one kernel, dropout included, for GPUs: FlashAttention-2 (Dao, 2023) in Pallas, compiled by Triton.

cuDNN's kernels draw dropout from a seed that is fixed at compilation. Here the mask is `models/dropout.py`'s, computed
from an element's place where it is used: the same elements are dropped as by `plain_attention`, and neither logits
nor weights nor masks are ever written to memory.

With logits l = q·k / √d, w = exp(l - log Σ exp l), m the dropout mask over its probability, ∂o the output's gradient:

    o = Σ m·w·v        ∂v = Σ m·w·∂o        ∂l = w·(m·∂o·v - δ),  δ = ∂o·o        ∂q = Σ ∂l·k/√d        ∂k = Σ ∂l·q/√d

Kernels work on blocks of queries and keys of one head of one sample; sums over the other side run in a loop.

Axes: B batch, Q queries, K keys, H heads, d width of a head; block sizes are powers of two.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from scl_jax.models.dropout import kept, sample_words
from scl_jax.models.layers import key_lengths
from scl_jax.partition import by_sample

HEAD_WIDTHS = (16, 32, 64, 128)
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernels cut their work, and what they drop."""

    rate: float
    queries: int = 64  # of a block
    keys: int = 32
    warps: int = 4
    stages: int = 3
    interpret: bool = False  # run as ordinary operations, for tests without a GPU


def flash_attention(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    key_mask: Bool[Array, "B K"] | None,
    dropout_rate: float,
    dropout_key: Key[Array, ""] | None,
    interpret: bool = False,
) -> Float[Array, "B Q H d"]:
    """Multi-head scaled dot-product attention with dropout on its weights; d is one of `HEAD_WIDTHS`.

    `key_mask`: real keys first, then padding. A row without any real key reads its first key.
    """
    words = sample_words(dropout_key, key.shape[0])
    plan = Plan(dropout_rate if dropout_key is not None else 0.0, interpret=interpret)
    return attention(plan, query, key, value, key_lengths(key, key_mask), words)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    plan: Plan,
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    lengths: Int[Array, " B"],
    words: UInt32[Array, "B 2"],
) -> Float[Array, "B Q H d"]:
    """Attention to the first `lengths` keys of each sample; `words` are those of its dropout mask."""
    return attention_forward(plan, query, key, value, lengths, words)[0]


def attention_forward(plan: Plan, query, key, value, lengths, words):
    """The output, and what the backward pass needs: beside the inputs one number a query."""
    y, log_sum = by_sample(partial(call_forward, plan), query, key, value, lengths, words)
    return y, (query, key, value, lengths, words, y, log_sum)


def attention_backward(plan: Plan, kept_arrays, gradient):
    """Gradients of query, key and value."""
    query, key, value, lengths, words, y, log_sum = kept_arrays
    product = gradient.astype(jnp.float32) * y.astype(jnp.float32)
    along = product.sum(axis=-1).swapaxes(1, 2)  # δ (B, H, Q)
    arguments = (query, key, value, gradient, log_sum, along, lengths, words)
    (query_gradient,) = by_sample(partial(call_query_gradient, plan), *arguments)
    key_gradient, value_gradient = by_sample(partial(call_key_gradient, plan), *arguments)
    return query_gradient, key_gradient, value_gradient, None, None


attention.defvjp(attention_forward, attention_backward)


# ---- calls: which part of the arrays an instance of a kernel sees ----


def tokens(x: Any) -> pl.BlockSpec:
    """All tokens of one head of one sample: (B, N, H, d) → (N, d)."""
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda block, head, row: (row, 0, head, 0))


def numbers(x: Any) -> pl.BlockSpec:
    """The numbers of the queries of one head of one sample: (B, H, Q) → (Q,)."""
    return pl.BlockSpec((None, None, x.shape[2]), lambda block, head, row: (row, head, 0))


def of_sample(x: Any) -> pl.BlockSpec:
    """(B,) → () or (B, 2) → (2,)."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda block, head, row: (row, *[0] * (x.ndim - 1)))


def call(plan: Plan, kernel: Any, name: str, blocks: int, products: int, ins, outs) -> Any:
    """Runs a kernel for `blocks` blocks of every head of every sample; `ins` and `outs` are (array or shape, part).

    `products`: matrix products of size Q · K · d a head, without logits that are computed again.
    """
    (batch, queries, heads, width), keys = ins[0][0].shape, ins[1][0].shape[1]
    size = batch * heads * queries * keys
    read = sum(x.size * x.dtype.itemsize for x, _ in [*ins, *outs])
    return pl.pallas_call(
        partial(kernel, plan=plan),
        grid=(blocks, heads, batch),
        in_specs=[part(x) for x, part in ins],
        out_specs=[part(x) for x, part in outs],
        out_shape=[x for x, _ in outs],
        compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        cost_estimate=pl.CostEstimate(flops=2 * products * size * width, transcendentals=size, bytes_accessed=read),
        interpret=plan.interpret,
        name=name,
    )(*(x for x, _ in ins))


def call_forward(plan: Plan, query, key, value, lengths, words):
    """Output (B, Q, H, d) and log₂ Σ 2^logits (B, H, Q)."""
    b, queries, heads, _ = query.shape
    ins = [(query, tokens), (key, tokens), (value, tokens), (lengths, of_sample), (words, of_sample)]
    log_sum = jax.ShapeDtypeStruct((b, heads, queries), jnp.float32)
    outs = [(shape_of(query), tokens), (log_sum, numbers)]
    return call(plan, forward_kernel, "attention_forward", pl.cdiv(queries, plan.queries), 2, ins, outs)


def call_query_gradient(plan: Plan, query, key, value, gradient, log_sum, along, lengths, words):
    """∂q."""
    ins = gradient_inputs(query, key, value, gradient, log_sum, along, lengths, words)
    blocks = pl.cdiv(query.shape[1], plan.queries)
    return call(plan, query_gradient_kernel, "attention_query_gradient", blocks, 1, ins, [(shape_of(query), tokens)])


def call_key_gradient(plan: Plan, query, key, value, gradient, log_sum, along, lengths, words):
    """∂k and ∂v."""
    ins = gradient_inputs(query, key, value, gradient, log_sum, along, lengths, words)
    outs = [(shape_of(key), tokens), (shape_of(value), tokens)]
    return call(plan, key_gradient_kernel, "attention_key_gradient", pl.cdiv(key.shape[1], plan.keys), 3, ins, outs)


def gradient_inputs(query, key, value, gradient, log_sum, along, lengths, words) -> list:
    """What both gradient kernels read."""
    of_tokens = [(x, tokens) for x in (query, key, value, gradient)]
    return [*of_tokens, (log_sum, numbers), (along, numbers), (lengths, of_sample), (words, of_sample)]


def shape_of(x: Array) -> jax.ShapeDtypeStruct:
    """Shape and type of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# ---- kernels ----


def load(ref: Any, start: Any, size: int) -> Array:
    """`size` rows or numbers from `start`, zeros behind the end."""
    inside = start + jnp.arange(size) < ref.shape[0]
    if len(ref.shape) == 1:
        return triton.load(ref.at[pl.ds(start, size)], mask=inside, other=0.0)
    return triton.load(ref.at[pl.ds(start, size), :], mask=inside[:, None], other=0.0)


def store(ref: Any, start: Any, x: Array) -> None:
    """Writes the rows or numbers of `x` that lie before the end."""
    inside = start + jnp.arange(x.shape[0]) < ref.shape[0]
    if len(ref.shape) == 1:
        triton.store(ref.at[pl.ds(start, x.shape[0])], x, mask=inside)
    else:
        triton.store(ref.at[pl.ds(start, x.shape[0]), :], x.astype(ref.dtype), mask=inside[:, None])


class Head:
    """What holds for all blocks of one head of one sample; blocks are named by their first query and first key."""

    def __init__(self, plan: Plan, q_ref: Any, k_ref: Any, length_ref: Any, words_ref: Any):
        self.plan, self.keys, self.length = plan, k_ref.shape[0], length_ref[...]
        self.shape = (plan.queries, plan.keys)
        self.scale = q_ref.shape[1] ** -0.5
        if plan.rate:
            self.words = words_ref[0], words_ref[1]
            self.first_row = pl.program_id(1) * q_ref.shape[0]

    def key_blocks(self) -> Any:
        """Blocks that hold keys that count."""
        return jax.lax.div(self.length + self.plan.keys - 1, self.plan.keys)

    def logits(self, query: Array, key: Array, first_key: Any) -> Array:
        """q·k·log₂e / √d, and -∞ at keys that do not count."""
        column = first_key + jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
        return jnp.where(column < self.length, triton.dot(query, key.T) * (self.scale * LOG2_E), -jnp.inf)

    def drop(self, x: Array, first_query: Any, first_key: Any) -> Array:
        """`x` over the probability of keeping where weights are kept, else 0."""
        if not self.plan.rate:
            return x
        row = self.first_row + first_query + jax.lax.broadcasted_iota(jnp.int32, self.shape, 0)
        place = row * self.keys + first_key + jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
        keep = kept(place.astype(jnp.uint32), *self.words, 1.0 - self.plan.rate)
        return jnp.where(keep, x * (1.0 / (1.0 - self.plan.rate)), 0.0)


def forward_kernel(q_ref, k_ref, v_ref, length_ref, words_ref, y_ref, log_sum_ref, *, plan: Plan):
    """A block of queries; softmax on the way: the sum so far is scaled down whenever a larger logit comes."""
    head, first_query = Head(plan, q_ref, k_ref, length_ref, words_ref), pl.program_id(0) * plan.queries
    query = load(q_ref, first_query, plan.queries)

    def add(block, state):
        total, highest, z = state
        first_key = block * plan.keys
        key, value = load(k_ref, first_key, plan.keys), load(v_ref, first_key, plan.keys)
        logits = head.logits(query, key, first_key)
        new = jnp.maximum(highest, logits.max(axis=1))
        shrink = jnp.exp2(highest - new)
        weights = jnp.exp2(logits - new[:, None])
        z = z * shrink + weights.sum(axis=1)
        dropped = head.drop(weights, first_query, first_key).astype(value.dtype)
        return total * shrink[:, None] + triton.dot(dropped, value), new, z

    zeros = jnp.zeros((plan.queries, q_ref.shape[1]), jnp.float32)
    state = zeros, jnp.full(plan.queries, -jnp.inf, jnp.float32), jnp.zeros(plan.queries, jnp.float32)
    total, highest, z = jax.lax.fori_loop(0, head.key_blocks(), add, state)
    store(y_ref, first_query, total / z[:, None])
    store(log_sum_ref, first_query, highest + jnp.log2(z))


def query_gradient_kernel(
    q_ref, k_ref, v_ref, dy_ref, log_sum_ref, along_ref, length_ref, words_ref, dq_ref, *, plan: Plan
):
    """∂q of a block of queries: a loop over keys."""
    head, first_query = Head(plan, q_ref, k_ref, length_ref, words_ref), pl.program_id(0) * plan.queries
    query, dy, log_sum, along = (
        load(ref, first_query, plan.queries) for ref in (q_ref, dy_ref, log_sum_ref, along_ref)
    )

    def add(block, total):
        first_key = block * plan.keys
        key, value = load(k_ref, first_key, plan.keys), load(v_ref, first_key, plan.keys)
        weights = jnp.exp2(head.logits(query, key, first_key) - log_sum[:, None])
        of_weights = head.drop(triton.dot(dy, value.T), first_query, first_key)
        of_logits = weights * (of_weights - along[:, None])
        return total + triton.dot(of_logits.astype(key.dtype), key)

    zeros = jnp.zeros((plan.queries, q_ref.shape[1]), jnp.float32)
    store(dq_ref, first_query, jax.lax.fori_loop(0, head.key_blocks(), add, zeros) * head.scale)


def key_gradient_kernel(
    q_ref, k_ref, v_ref, dy_ref, log_sum_ref, along_ref, length_ref, words_ref, dk_ref, dv_ref, *, plan: Plan
):
    """∂k and ∂v of a block of keys: a loop over queries; nothing to add where none of the keys counts."""
    head, first_key = Head(plan, q_ref, k_ref, length_ref, words_ref), pl.program_id(0) * plan.keys
    key, value = load(k_ref, first_key, plan.keys), load(v_ref, first_key, plan.keys)

    def add(block, state):
        of_key, of_value = state
        first_query = block * plan.queries
        query, dy, log_sum, along = (
            load(ref, first_query, plan.queries) for ref in (q_ref, dy_ref, log_sum_ref, along_ref)
        )
        weights = jnp.exp2(head.logits(query, key, first_key) - log_sum[:, None])
        dropped = head.drop(weights, first_query, first_key).astype(dy.dtype)
        of_weights = head.drop(triton.dot(dy, value.T), first_query, first_key)
        of_logits = (weights * (of_weights - along[:, None])).astype(query.dtype)
        return of_key + triton.dot(of_logits.T, query), of_value + triton.dot(dropped.T, dy)

    zeros = jnp.zeros((plan.keys, k_ref.shape[1]), jnp.float32)
    blocks = (first_key < head.length).astype(jnp.int32) * pl.cdiv(q_ref.shape[0], plan.queries)
    of_key, of_value = jax.lax.fori_loop(0, blocks, add, (zeros, zeros))
    store(dk_ref, first_key, of_key * head.scale)
    store(dv_ref, first_key, of_value)
