"""Matrix FLOPs of a jitted function, and the peak of a device: together, model FLOPs utilisation (MFU).

Counted on the traced program: every matrix product and convolution, the body of a scan times its length. What a remat
policy computes again is counted again, since the device does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# dense bf16 FLOP/s by a part of `device_kind`, from the makers' data sheets; the first that fits counts
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(device: Any) -> float | None:
    """Dense bf16 FLOP/s of a device; None where it is not known, as for a CPU."""
    return next((peak for kind, peak in PEAKS.items() if kind in device.device_kind), None)


def count_flops(function: Callable, *arguments: Any, static_argnums: tuple[int, ...] = ()) -> float:
    """Matrix FLOPs of one call, over all devices; arguments may be shapes."""
    if isinstance(function, jax.stages.Wrapped):  # jitted, maybe with options, which only an outermost jit may have
        return _flops(function.trace(*arguments).jaxpr.jaxpr)
    return _flops(jax.make_jaxpr(function, static_argnums=static_argnums)(*arguments).jaxpr)


def _flops(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
            total += 2.0 * math.prod(out) * math.prod(shape[axis] for axis in contracted)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * _flops(equation.params["jaxpr"].jaxpr)
        elif equation.primitive.name == "cond":
            total += max(_flops(branch.jaxpr) for branch in equation.params["branches"])
        elif equation.primitive.name == "pallas_call":  # its program is that of one block; kernels say what all do
            total += equation.params["cost_estimate"].flops
        elif equation.primitive.name == "shard_map":
            (inner,) = _inner(equation.params)
            if not inner.invars:  # what nobody reads has been taken out, and no product of inputs is left
                continue
            total += _flops(inner) * equation.invars[0].aval.size / inner.invars[0].aval.size  # pyright: ignore[reportAttributeAccessIssue]
        else:
            total += sum(_flops(inner) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs inside an equation: of a jit, a checkpoint, a custom derivative; from JAX 0.11 on one class."""
    programs = [value for value in params.values() if isinstance(value, (core.ClosedJaxpr, core.Jaxpr))]
    return [program.jaxpr if isinstance(program, core.ClosedJaxpr) else program for program in programs]
