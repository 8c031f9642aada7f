"""Will it fit? `python -m scl_jax.compile_tpu --config=configs/pretrain_joint.py --topology=v5e:16x16`.

Compiles the very step that `scl_jax.main` runs with the real TPU compiler, for chips that are not there: libtpu is
needed (`pip install -e ".[tpu]"`), a TPU is not, and nothing is allocated. Says for every stream how much memory a chip
needs, its FLOPs, what the collectives send, and the largest buffers. Ends with 1 when a step does not fit, after
trying what would (`model.remat`).

    --topology=v5e:16x16 | v4:4x4x4 | v5p:8x8x16 | v6e:8x8   chips of one slice
    --mesh=data=32,fsdp=8                                   instead of the config's
    --record=docs/scaling.jsonl                             also append what was found, for scl_jax.scaling_table

A vocabulary of size 0 (the tokenizer's) counts as `--vocabulary`, answers (those of the data set) as VQA v2's; shards
and tokenizer are not needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from scl_jax import build
from scl_jax.config import active_streams, finalize
from scl_jax.config_check import check
from scl_jax.config_flag import CONFIG as _CONFIG
from scl_jax.config_flag import parse
from scl_jax.models import parameters
from scl_jax.remat import ROOM, least, out_of_memory, policies, with_policy
from scl_jax.tpu_compiler import roomy_stacks
from scl_jax.training import sharding
from scl_jax.training.flops import count_flops
from scl_jax.training.hlo import Program
from scl_jax.training.memory import planned_bytes
from scl_jax.training.scopes import scope_of

GIB = 2**30
ANSWERS = 3129  # of VQA v2
# clocks, by the maker's peak in bfloat16 over the products of a cycle: 8 units of 128 × 128 on a v4 or v5p chip, 4 on a
# v5e, 4 of 256 × 256 on a v6e
GIGAHERTZ = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}
SCOPES = 12  # of the longest ones are shown
# HBM that a program may use, in GiB, as the compiler of libtpu 0.0.42 names it when it refuses one
HBM = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}

_TOPOLOGY = flags.DEFINE_string("topology", None, "Kind and shape of the slice, such as v5e:16x16 or v5p:4x4x8.")
_MESH = flags.DEFINE_string("mesh", "", "Mesh sizes instead of the config's, such as data=32,fsdp=8.")
_STREAMS = flags.DEFINE_list("streams", [], "Only these streams; default: all that are on.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 50265, "Of the tokenizer, where the config leaves it to that.")
_BUFFERS = flags.DEFINE_integer("buffers", 8, "How many of the largest buffers are shown.")
_RECORD = flags.DEFINE_string("record", "", "A JSON-lines file that the findings are appended to.")


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the compiler says about one step; sizes in bytes, all of one chip."""

    config: str
    stream: str
    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str
    fits: bool
    parameters: int
    traced_flops: float  # of the program as written, recomputation included, divided by the chips
    hbm: float
    arguments: int = 0
    temporaries: int = 0
    code: int = 0
    total: int = 0
    flops: float = 0.0  # of the compiled program
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # kind → (how many, bytes sent)
    buffers: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)  # (bytes, type, origin)
    # scope → seconds by the compiler's cost model, without kernels, collectives and copies in the background
    seconds_by_scope: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)  # costly changes of layout; loops counted once
    problem: str = ""  # why it was refused
    seconds: float = 0.0


def tpu_devices(topology: str) -> list[Any]:
    """Descriptions of the chips of a slice such as "v5e:16x16"; no chip is needed.

    Raises:
        ValueError: libtpu is missing, or knows no such slice.
    """
    roomy_stacks()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for the metadata server of a TPU VM
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # others may compile at the same time; no chip is held
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    kind = topology.partition(":")[0]
    if kind not in HBM or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise ValueError(f"--topology={topology}: write kind:shape, kind one of {', '.join(HBM)}, such as v5e:16x16")
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}  # a v4 chip's two cores are one device
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except (RuntimeError, ImportError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f'--topology={topology}: {first} (libtpu comes with pip install -e ".[tpu]")') from error


def compile_step(config: ConfigDict, stream: str, devices: list[Any], topology: str, buffers: int = 8) -> Findings:
    """Compiles the training step of one stream with all its objectives on, for these devices.

    Args:
        config: finalized.
        devices: descriptions of chips, or devices of this machine.

    Raises:
        ConfigError: the config cannot run on so many devices.
    """
    start = time.perf_counter()
    config = build.for_platform(config, "tpu")  # this process runs on a CPU
    check(config, 0, len(devices), max(1, len({device.process_index for device in devices})))
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    vocabulary = config.model.text.vocab_size
    task = build.task(config, vocabulary, vocabulary - 1)  # which token is the mask changes no shape
    step, arguments = build.planned_step(config, task, stream, mesh)
    findings = Findings(
        config="",
        stream=stream,
        topology=topology,
        chips=len(devices),
        mesh=dict(mesh.shape),
        batch_size=config.data[stream].batch_size,
        accumulate=config.train.accumulate,
        remat=build.remat(config),
        fits=False,
        parameters=parameters.count(arguments[0].params),
        traced_flops=count_flops(step, *arguments, static_argnums=(2,)) / len(devices),
        hbm=HBM.get(topology.partition(":")[0], float("inf")) * GIB,
    )
    at_least = least(config, task, stream, mesh)
    if at_least > findings.hbm:
        problem = f"not compiled: at least {at_least / GIB:.1f} GiB a chip for the backward pass"
        return dataclasses.replace(findings, problem=problem, seconds=time.perf_counter() - start)
    warnings: list[str] = []
    try:
        with _partitioner_warnings(warnings):
            compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        problem = str(error).strip()
        return dataclasses.replace(findings, problem=problem, warnings=warnings, seconds=time.perf_counter() - start)
    program = Program(compiled.as_text())
    memory = compiled.memory_analysis()
    total = planned_bytes(compiled)
    return dataclasses.replace(
        findings,
        fits=total <= findings.hbm,
        arguments=total - memory.temp_size_in_bytes - memory.generated_code_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        total=total,
        flops=program.flops(),
        collectives=program.collectives(),
        buffers=program.largest(buffers),
        seconds_by_scope=seconds_by_scope(program, topology),
        warnings=[*warnings, *(f"counted once, trip count unknown: {loop}" for loop in program.unbounded())],
        seconds=time.perf_counter() - start,
    )


def seconds_by_scope(program: Program, topology: str) -> dict[str, float]:
    """Seconds of one step by named scope as the compiler's cost model has them, the longest first; none on a CPU."""
    clock = 1e9 * GIGAHERTZ.get(topology.partition(":")[0], 1.0)
    seconds: dict[str, float] = defaultdict(float)
    for origin, cycles in program.cycles().items():
        seconds[scope_of(origin)] += cycles / clock
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


@contextmanager
def _partitioner_warnings(found: list[str]) -> Iterator[None]:
    """Collects what the partitioner says about layouts that it cannot change cheaply.

    It writes to file number 2, whose text goes on to where it went, so that nothing is lost should the compiler abort.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    reading, writing = os.pipe()

    def pass_on() -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                os.write(saved, line)
                if b"nvoluntary" in line:
                    found.append(line.decode(errors="replace").strip())

    reader = threading.Thread(target=pass_on)
    reader.start()
    os.dup2(writing, 2)
    os.close(writing)
    try:
        yield
    finally:
        os.dup2(saved, 2)  # closes the last writing end
        reader.join()
        os.close(saved)


def describe(f: Findings) -> str:
    """The findings for people."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in f.mesh.items())
    lines = [
        f"{f.stream}: batch {f.batch_size} on {f.topology} ({f.chips} chips; {mesh}), remat {f.remat}, "
        f"{f.parameters / 1e6:.1f} M parameters, compiled in {f.seconds:.0f} s"
    ]
    if f.problem:
        return "\n".join([*lines, f"  does not fit: {f.problem}"])
    lines += [
        f"  memory a chip     {f.total / GIB:8.2f} GiB of {f.hbm / GIB:.2f}: arguments {f.arguments / GIB:.2f}, "
        f"temporaries {f.temporaries / GIB:.2f}, code {f.code / GIB:.2f}",
        f"  FLOPs a chip      {f.flops / 1e12:8.3f} T compiled, {f.traced_flops / 1e12:.3f} T as written",
    ]
    lines += [
        f"  {kind:<18}{size / 2**20:8.1f} MiB sent a chip by {count}" for kind, (count, size) in f.collectives.items()
    ]
    if f.seconds_by_scope:
        longest = ", ".join(f"{scope} {1e3 * s:.1f}" for scope, s in list(f.seconds_by_scope.items())[:SCOPES])
        total = 1e3 * sum(f.seconds_by_scope.values())
        lines += [f"  compiler's guess  {total:8.1f} ms a step, without kernels and collectives: {longest}"]
    lines += [f"  buffer            {size / 2**20:8.1f} MiB {kind}  {origin}" for size, kind, origin in f.buffers]
    lines += [f"  warning           {line}" for line in f.warnings]
    verdict = "fits" if f.fits else "does not fit"
    return "\n".join([*lines, f"  {verdict} with remat {f.remat}"])


def with_mesh(config: ConfigDict, sizes: str) -> ConfigDict:
    """The config with mesh sizes such as "data=32,fsdp=8"; axes that are not named have size 1.

    Raises:
        ValueError: an unknown axis, or no number.
    """
    if sizes:
        found = dict(re.findall(r"(\w+)=(-?\d+)", sizes))
        if not set(found) <= set(sharding.AXES) or ",".join(f"{a}={n}" for a, n in found.items()) != sizes:
            raise ValueError(f"--mesh={sizes}: write sizes of {', '.join(sharding.AXES)}, such as data=32,fsdp=8")
        config.mesh.update({axis: int(found.get(axis, 1)) for axis in sharding.AXES})
    return config


def find(config: ConfigDict, stream: str, devices: list[Any], topology: str, buffers: int) -> list[Findings]:
    """The config's own remat policy; while that does not fit, the ones that need less memory."""
    most = ROOM if config.model.remat == "auto" else 1.0  # "auto" leaves as much room as in training
    tried: list[Findings] = []
    for policy in policies(config.model.remat):
        tried.append(compile_step(with_policy(config, policy), stream, devices, topology, buffers))
        if tried[-1].fits and tried[-1].total <= most * tried[-1].hbm:
            break
    return tried


def main(argv: list[str]) -> None:
    """Runs the command."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {' '.join(argv[1:])}? Options are written --name=value")
    jax.config.update("jax_platforms", "cpu")
    fits = True
    try:
        config = with_mesh(finalize(_CONFIG.value, _VOCABULARY.value, ANSWERS), _MESH.value)
        streams = active_streams(config)
        if not set(_STREAMS.value) <= set(streams):
            raise ValueError(f"--streams={','.join(_STREAMS.value)}: the config has {', '.join(streams)}")
        devices = tpu_devices(str(_TOPOLOGY.value))
        for stream in _STREAMS.value or streams:
            tried = find(config, stream, devices, str(_TOPOLOGY.value), _BUFFERS.value)
            for findings in tried:
                print(describe(findings), flush=True)
                if _RECORD.value:
                    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
                    with Path(_RECORD.value).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(dataclasses.asdict(findings) | {"config": name}) + "\n")
            own = tried[-1] if config.model.remat == "auto" else tried[0]
            fits = fits and own.fits
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not fits:
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse)
