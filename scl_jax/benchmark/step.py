"""`step`: samples a second, FLOPs, MFU, memory and compile time of a config's training step."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from scl_jax.benchmark import workload
from scl_jax.benchmark.profile import seconds_by_scope
from scl_jax.training.flops import count_flops, peak_flops


def measure(
    config: ConfigDict, stream: str, batch_size: int, repeats: int, warmup: int, with_profile: bool
) -> dict[str, Any]:
    """Compiles the step of `config` and times it; see the names of the results. Seconds, bytes and FLOPs.

    `mfu` is model FLOPs over time and the fastest measured matrix product of the same type; `mfu_of_data_sheet` over
    the maker's bf16 figure, where it is known.
    """
    config = workload.complete(config, stream, batch_size)
    training = workload.Training(config, stream)
    seconds = timed(training.run, repeats, warmup)
    flops = count_flops(training.function, *training.shapes(), training.active, static_argnums=(2,))
    devices = training.mesh.devices.size
    peak = matmul_peak(config.model.dtype) * devices
    data_sheet = peak_flops(training.mesh.devices.flat[0])
    results = {
        "batch": training.rows,
        "dtype": config.model.dtype,
        "remat": training.remat,
        "seconds_per_step": seconds,
        "samples_per_second": training.rows / seconds,
        "matrix_flops_per_sample": flops / training.rows,
        "flops_per_second": flops / seconds,
        "matmul_peak_flops_per_second": peak,
        "mfu": flops / seconds / peak,
        "mfu_of_data_sheet": flops / seconds / (data_sheet * devices) if data_sheet else None,
        "compile_seconds": training.compile_seconds,
        **memory(training.compiled),
    }
    if with_profile:
        results["seconds_by_scope"] = seconds_by_scope(training.run, training.compiled.as_text())
    return results


def timed(run: Any, repeats: int, warmup: int) -> float:
    """Median seconds of `repeats` calls after `warmup` others."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_peak(dtype: str, repeats: int = 5) -> float:
    """FLOP/s of one device's fastest large matrix product in `dtype`."""
    on_cpu = jax.default_backend() == "cpu"
    best = 0.0
    for size in (1024, 2048) if on_cpu else (4096, 8192, 16384):
        # numbers as in training: a GPU multiplies ones faster
        x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
        product = jax.jit(jnp.matmul).lower(x, x).compile()
        chain = 1 if on_cpu else 10  # enough work to hide the launch

        def run(product=product, x=x, chain=chain) -> None:
            y = x
            for _ in range(chain):
                y = product(x, x)
            jax.block_until_ready(y)

        best = max(best, chain * 2.0 * size**3 / timed(run, repeats, 1))
    return best


def memory(compiled: Any) -> dict[str, int | None]:
    """Peak bytes: as the compiler planned them, and as they were seen so far, of the device or (CPU) the process."""
    plan = compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return {"planned_bytes": planned - plan.alias_size_in_bytes, "peak_bytes": peak_memory()}


def peak_memory() -> int:
    """Peak bytes in use of the first device, or of this process on a CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
