"""The backward pass of LayerNorm in one kernel, for GPUs (Pallas, compiled by Triton).

XLA goes over the arrays four times: for the means along a row, the gradient of the input, and the two sums over rows.
Here a program takes rows in turn, writes the gradient of the input, and keeps its own part of both sums.

Axes: B batch, R rows, D width, P programs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from scl_jax.partition import by_sample

ROWS = 4  # that a program holds at a time
PROGRAMS = 1024


def layer_norm_gradients(
    x: Float[Array, "B ... D"],
    gradient: Float[Array, "B ... D"],
    mean: Float[Array, "B ... 1"],
    inverse: Float[Array, "B ... 1"],
    scale: Float[Array, " D"],
    interpret: bool = False,
) -> tuple[Float[Array, "B ... D"], Float[Array, " D"], Float[Array, " D"]]:
    """Gradients of input, scale and bias; `mean` and `inverse` deviation of each row are the forward pass's."""
    whole = jnp.broadcast_to(scale, (x.shape[0], *scale.shape))  # by sample, as the rest; its first row is read
    dx, of_scale, of_bias = by_sample(partial(call, interpret), x, gradient, mean, inverse, whole)
    return dx, of_scale.sum(axis=0), of_bias.sum(axis=0)


def call(interpret: bool, x, gradient, mean, inverse, scale):
    """The gradient of the input, and each program's part of the sums (P, D)."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    rows = len(flat)
    turns = pl.cdiv(rows, ROWS * PROGRAMS)
    programs = pl.cdiv(rows, ROWS * turns)
    sums = jax.ShapeDtypeStruct((programs, width), jnp.float32)
    dx, of_scale, of_bias = pl.pallas_call(
        partial(kernel, turns=turns),
        grid=(programs,),
        out_shape=(jax.ShapeDtypeStruct(flat.shape, flat.dtype), sums, sums),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=3 * flat.size * flat.dtype.itemsize),
        interpret=interpret,
        name="layer_norm_gradients",
    )(flat, gradient.reshape(flat.shape), mean.reshape(-1), inverse.reshape(-1), scale[0])
    return dx.reshape(x.shape), of_scale, of_bias


def kernel(x_ref, dy_ref, mean_ref, inverse_ref, scale_ref, dx_ref, of_scale_ref, of_bias_ref, *, turns: int):
    """`turns` times `ROWS` rows."""
    rows, width = x_ref.shape
    columns = jnp.arange(pl.next_power_of_2(width))
    real = columns < width
    program = pl.program_id(0)
    scale = triton.load(scale_ref.at[columns], mask=real, other=0.0)

    def add(turn, state):
        of_scale, of_bias = state
        index = (program * turns + turn) * ROWS + jnp.arange(ROWS)
        inside = (index < rows)[:, None] & real[None, :]
        place = index[:, None], columns[None, :]

        def block(ref: Any) -> Array:
            return triton.load(ref.at[place], mask=inside, other=0.0).astype(jnp.float32)

        x, dy = block(x_ref), block(dy_ref)
        mean, inverse = (
            triton.load(ref.at[index], mask=index < rows, other=0.0)[:, None] for ref in (mean_ref, inverse_ref)
        )
        unit = jnp.where(inside, (x - mean) * inverse, 0.0)
        scaled = dy * scale
        along = (scaled * unit).sum(axis=1, keepdims=True) * (1.0 / width)
        average = scaled.sum(axis=1, keepdims=True) * (1.0 / width)
        dx = inverse * (scaled - average - unit * along)
        triton.store(dx_ref.at[place], dx.astype(dx_ref.dtype), mask=inside)
        return of_scale + (dy * unit).sum(axis=0), of_bias + dy.sum(axis=0)

    zeros = jnp.zeros(columns.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, turns, add, (zeros, zeros))
    for ref, total in zip((of_scale_ref, of_bias_ref), sums, strict=True):
        triton.store(ref.at[program, columns], total, mask=real)
