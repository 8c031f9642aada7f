"""Training steps compiled where there is no GPU, to be timed on one: none of its time goes into compiling.

    python benchmarks/ahead.py compile runs/ahead --config=configs/pretrain_image.py --batch=64
    python benchmarks/ahead.py compile runs/ahead --config=configs/pretrain_video.py --stream=videos --batch=16
    python benchmarks/ahead.py run runs/ahead --trace        # on the GPU; runs/ahead is all it needs beside the code

`compile` wants jax[cuda13] of the GPU machine's version and a CPU, and tells the memory that the step will take.
XLA tries no variants of its kernels without a device, so that `run` is at best as fast as a step compiled on the GPU.
cuDNN's attention cannot be compiled ahead (model.attention=fused, the default on GPUs, has none).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import lzma
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# XLA's description of a GPU, as `jax.devices()` of such a machine has it
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 15 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
TARGETS = {
    "h100": HOPPER.format(name="NVIDIA H100 80GB HBM3", bandwidth=3352320000000, cache=52428800, memory=84929347584),
    "h200": HOPPER.format(name="NVIDIA H200", bandwidth=4800000000000, cache=62914560, memory=150754820096),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compile", "run"))
    parser.add_argument("folder", type=Path, help="of the compiled steps")
    parser.add_argument("--config", default="configs/pretrain_image.py")
    parser.add_argument("--stream", default="images", choices=("images", "videos"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="such as model.remat=full")
    parser.add_argument("--target", default="h100", choices=sorted(TARGETS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--trace", action="store_true", help="run: also the time of every named scope")
    return parser.parse_args(argv)


def load_config(options: dict[str, Any]) -> Any:
    """The complete config of a step: bfloat16, the kernels of a GPU, nothing computed twice, loops unrolled; `set`."""
    from scl_jax.benchmark.workload import complete, read_config

    config = read_config(ROOT / options["config"])
    config.model.update(dtype="bfloat16", attention="fused", remat="none", unroll=12)
    for assignment in options["set"]:
        name, _, value = assignment.partition("=")
        *path, last = name.split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = type(node[last])(value)
    return complete(config, options["stream"], options["batch"])


def make_step(config: Any, mesh: Any) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step and its arguments as shapes with their places on the mesh: state, batch, active objectives."""
    from scl_jax import build
    from scl_jax.config import active_streams

    vocabulary = config.model.text.vocab_size
    (stream,) = active_streams(config)
    return build.planned_step(config, build.task(config, vocabulary, vocabulary - 1), stream, mesh)


# ---- where there is no GPU ----


def absent_devices(target: str) -> list[Any]:
    """One GPU that is not there, for the compiler."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the check asks for a driver
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="  # see gpu.sh
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="cuda", target_config=TARGETS[target], topology="1x1x1").devices)


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """A program that comes out of the cache cannot be written again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is used
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def file_name(options: argparse.Namespace) -> str:
    """Of a step: "pretrain_image-h100-images-64" and its settings, or their hash where they are too long for a name."""
    settings = "-".join(setting.replace("=", "_").replace("/", "_") for setting in options.set)
    if len(settings) > 100:
        settings = hashlib.sha256(settings.encode()).hexdigest()[:8]
    parts = [Path(options.config).stem, options.target, options.stream, str(options.batch), settings]
    return "-".join(filter(None, parts))


def compile_step(options: argparse.Namespace) -> None:
    """Writes the compiled step, its text and what it is."""
    devices = absent_devices(options.target)  # before anything else looks for devices
    from jax.experimental import serialize_executable

    from scl_jax.benchmark.step import memory
    from scl_jax.training import sharding
    from scl_jax.training.flops import count_flops

    described = {name: getattr(options, name) for name in ("config", "target", "stream", "batch", "set")}
    config = load_config(described)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    step, arguments = make_step(config, mesh)
    start = time.perf_counter()
    with without_compilation_cache():
        compiled = step.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    planned: Any = memory(compiled)["planned_bytes"]
    described |= {"planned_bytes": planned, "flops": count_flops(step, *arguments, static_argnums=(2,))}
    name = file_name(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    payload, _, _ = serialize_executable.serialize(compiled)
    (options.folder / f"{name}.xz").write_bytes(lzma.compress(payload, preset=1))
    (options.folder / f"{name}.hlo.xz").write_bytes(lzma.compress(compiled.as_text().encode(), preset=1))
    (options.folder / f"{name}.json").write_text(json.dumps(described, indent=2) + "\n")
    print(f"{name}: {planned / 2**30:.2f} GiB planned, compiled in {seconds:.0f} s")


# ---- on the GPU ----


def fill(path: Any, x: Any, noise: Any) -> Any:
    """Weights as at the start of a run; moments of zero."""
    import jax
    import numpy as np

    name = jax.tree_util.keystr(path)
    if np.issubdtype(x.dtype, np.integer) or "scale" in name:
        values = np.ones(x.shape, x.dtype)
    elif any(part in name for part in (".mu", ".nu", "bias")):
        values = np.zeros(x.shape, x.dtype)
    elif "temperature" in name:
        values = np.full(x.shape, 0.07, x.dtype)
    else:
        values = np.resize(noise, x.shape).astype(x.dtype)
    return jax.device_put(values, x.sharding)


def run_step(file: Path, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    """Loads and times one step; the results of `scl_jax.benchmark step`."""
    import jax
    import numpy as np
    from jax.experimental import serialize_executable

    from scl_jax.benchmark.profile import seconds_by_scope
    from scl_jax.benchmark.step import peak_memory
    from scl_jax.benchmark.workload import random_arrays
    from scl_jax.training import sharding
    from scl_jax.types import Batch

    described = json.loads(file.with_suffix(".json").read_text())
    config = load_config(described)
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:1])
    step, (planned, _, active) = make_step(config, mesh)
    noise = np.random.default_rng(0).standard_normal(2**22 - 3, dtype=np.float32) * 0.02
    state = jax.tree_util.tree_map_with_path(lambda path, x: fill(path, x, noise), planned)
    batch = Batch(**sharding.global_batch(random_arrays(config, described["stream"], described["batch"]), mesh))
    trees = [((state, batch), {}), step.trace(state, batch, active).out_info]
    payload = lzma.decompress(file.read_bytes())
    compiled = serialize_executable.deserialize_and_load(
        payload, *map(jax.tree.structure, trees), execution_devices=list(mesh.devices.flat)
    )

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return jax.block_until_ready(metrics)

    run(), run()
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        metrics = run()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    results = described | {
        "seconds": seconds,
        "seconds_per_step": median,
        "samples_per_second": described["batch"] / median,
        "mfu": described["flops"] / median / peak,
        "peak_bytes": peak_memory(),
        "loss": float(metrics["loss/total"]),
    }
    if options.trace:
        program = lzma.decompress(file.with_suffix(".hlo.xz").read_bytes()).decode()
        results["seconds_by_scope"] = seconds_by_scope(run, program)
    return results


def run_all(options: argparse.Namespace) -> None:
    """Times every step of the folder and writes results beside it; ends with an error where one did not run."""
    import jax

    from scl_jax.benchmark.step import matmul_peak

    peak = matmul_peak("bfloat16")
    print(f"{jax.devices()[0].device_kind}, {peak / 1e12:.0f} TFLOP/s in a matrix product")
    failed = []
    for file in sorted(file for file in options.folder.glob("*.xz") if not file.name.endswith(".hlo.xz")):
        try:
            results = run_step(file, options, peak)
        except jax.errors.JaxRuntimeError as error:  # most likely for want of memory; others may fit
            print(f"{file.stem}: {str(error).splitlines()[0]}", flush=True)
            failed.append(file.stem)
            continue
        file.with_suffix(".results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(
            f"{file.stem}: {results['seconds_per_step']:.4f} s/step ({min(results['seconds']):.4f} to "
            f"{max(results['seconds']):.4f}), {results['samples_per_second']:.1f} samples/s, MFU {results['mfu']:.3f}, "
            f"peak {results['peak_bytes'] / 2**30:.2f} GiB, loss {results['loss']:.3f}",
            flush=True,
        )
        for scope, seconds in list(results.get("seconds_by_scope", {}).items())[:20]:
            print(f"    {1e3 * seconds:8.2f} ms  {scope}")
    if failed:
        sys.exit(f"error: {', '.join(failed)} did not run")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    arguments = parse()
    compile_step(arguments) if arguments.command == "compile" else run_all(arguments)
