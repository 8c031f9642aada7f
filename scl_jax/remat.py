"""Which activations a training step keeps: `model.remat=auto` takes what computes least again and fits the memory.

The policies are tried in their order. One whose activations alone are beyond the memory, by the traced programs, is
passed over in seconds; of the others the step of every stream is compiled, up to the first that does not fit, and the
compiler's plan decides. The compilation cache keeps the programs for the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from scl_jax import build
from scl_jax.models import parameters
from scl_jax.tasks.task import Task
from scl_jax.training.distributed import share
from scl_jax.training.memory import device_memory, kept_bytes, planned_bytes

GIB = 2**30
POLICIES = ("none", "dots", "full")  # each computes more again than the one before, and needs less memory
ROOM = 0.9  # share of the memory that a step may plan: the next batch, evaluation and gaps need some, too
# What a plan holds beside the state is at least so many times the activations as written, by platform. Of the full-size
# step with "none" it was 0.87 (images) and 0.91 (clips) for an H100, 1.3 for a v5p (images).
LEAST = {"tpu": 1.0}
LEAST_ELSEWHERE = 2 / 3


def policies(remat: str) -> tuple[str, ...]:
    """`remat` and those that need less memory; of "auto" all."""
    return POLICIES if remat == "auto" else POLICIES[POLICIES.index(remat) :]


def with_policy(config: ConfigDict, policy: str) -> ConfigDict:
    """A copy of the config with this policy."""
    config = config.copy_and_resolve_references()
    config.model.remat = policy
    return config


def out_of_memory(error: Exception) -> bool:
    """Whether a compiler refused a program for its memory, or a device could not give a program what it asked for."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def least(config: ConfigDict, task: Task, stream: str, mesh: Mesh) -> float:
    """Bytes of one device that a step needs at least, by what its forward pass keeps for the backward pass."""
    graph, params = parameters.abstract(build.model_maker(config))
    batch = build.batch_shapes(config, stream, mesh)
    kept = kept_bytes(
        task,
        graph,
        params,
        batch,
        task.active(config.train.steps),
        accumulate=config.train.accumulate,
        dropout=build.has_dropout(config),
    )
    return LEAST.get(mesh.devices.flat[0].platform, LEAST_ELSEWHERE) * kept / mesh.devices.size


def needed(config: ConfigDict, task: Task, stream: str, mesh: Mesh) -> tuple[float, str]:
    """(bytes of one device that a step needs, how that is known); infinity where the compiler only refuses it."""
    step, arguments = build.planned_step(config, task, stream, mesh)
    try:
        return planned_bytes(step.lower(*arguments).compile()), "planned"
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return float("inf"), "refused by the compiler"


def most_needed(
    config: ConfigDict, task: Task, streams: Sequence[str], mesh: Mesh, memory: int
) -> tuple[float, str, str]:
    """(bytes, how that is known, stream) of the step that needs most, or of the first that is found not to fit.

    Nothing is compiled where a traced program shows that it cannot fit, and nothing after a step that does not.
    """
    most = max((least(config, task, stream, mesh), "at least", stream) for stream in streams)
    if most[0] > memory:
        return most
    planned: list[tuple[float, str, str]] = []
    for stream in streams:
        planned.append((*needed(config, task, stream, mesh), stream))
        if planned[-1][0] > ROOM * memory:
            break
    return max(planned)


def resolve(
    config: ConfigDict,
    task: Task,
    streams: Sequence[str],
    mesh: Mesh,
    say: Callable[[str], None] = print,
    memory: int | None = None,
) -> ConfigDict:
    """The config with the policy that "auto" stands for here; another one stays.

    Args:
        streams: those whose steps must fit.
        say: gets a line for every policy that was looked at.
        memory: bytes of a device; None: what the devices say. Where they do not (CPUs), nothing is computed again.
    """
    if config.model.remat != "auto":
        return config
    memory = memory or device_memory()
    if memory is None:
        return with_policy(config, "none")
    for policy in POLICIES[:-1]:
        tried = with_policy(config, policy)
        most, how, stream = most_needed(tried, task, streams, mesh, memory)
        fits = most <= ROOM * memory
        size = "" if most == float("inf") else f" {most / GIB:.1f} of {memory / GIB:.1f} GiB"
        say(f"model.remat={policy}:{size} {how} ({stream}): {'taken' if fits else 'too much'}")
        if fits:
            return tried
    say(f"model.remat={POLICIES[-1]}: taken")
    return with_policy(config, POLICIES[-1])


def agreed(policy: str, timeout: int) -> str:
    """Of the policies that processes found, that which needs least memory: all must run one program.

    timeout: seconds that they wait for each other's compilers.
    """
    return max(share(policy, timeout), key=POLICIES.index)
