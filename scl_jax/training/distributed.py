"""Many processes, one run: who they are is read from flags, the environment, Slurm, Open MPI or the TPU's metadata.

`connect` comes before anything that touches a device. Where nothing names other processes, a run has one process.
The first source that applies counts:

| source | read from |
|---|---|
| explicit | flags `--coordinator --processes --process`, else SCL_COORDINATOR, SCL_PROCESSES, SCL_PROCESS |
| TPU | MEGASCALE_… (several slices), TPU_WORKER_HOSTNAMES and TPU_WORKER_ID (GKE), else the metadata of a TPU VM |
| Open MPI | OMPI_COMM_WORLD_…; SCL_COORDINATOR names the first host where several are used and mpirun does not say |
| Slurm | SLURM_PROCID, SLURM_NTASKS and the list of nodes, of one `srun` step |
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from scl_jax.types import Batch

TPU_PORT = 8476
PORTS = (61440, 4096)  # first and number of ports to choose from, above those that systems hand out


class ClusterError(ValueError):
    """What the environment says of the other processes makes no sense; the message names the variable."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Where the first process listens, how many there are, and which one this is."""

    coordinator: str  # host:port
    count: int
    index: int
    source: str  # for messages: "Slurm", "flags"
    local_devices: tuple[int, ...] | None = None  # of this process, where several share a host; None: all it sees

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ClusterError(f"{self.source}: process {self.index} of {self.count}; it must count from 0")
        if not re.fullmatch(r"(\[[^\]]+\]|[^\[\]:]+):\d+", self.coordinator):
            raise ClusterError(f"{self.source}: the coordinator is {self.coordinator!r}; write host:port")


def from_flags(coordinator: str, count: int, index: int, source: str = "flags") -> Processes | None:
    """Explicit settings; None where none is given (empty, 0, -1).

    Raises:
        ClusterError: only some are given.
    """
    given = (bool(coordinator), count > 0, index >= 0)
    if not any(given):
        return None
    if not all(given):
        raise ClusterError(f"{source}: coordinator, number of processes and process are needed together, or none")
    return Processes(coordinator, count, index, source)


def from_environment(env: Mapping[str, str]) -> Processes | None:
    """The processes that environment variables name; None where they name no others.

    Raises:
        ClusterError: variables that contradict each other or cannot be read.
    """
    for read in (_explicit, _tpu, _open_mpi, _slurm):
        processes = read(env)
        if processes is not None:
            return processes if processes.count > 1 else None
    return None


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not re.fullmatch(r"\d+", text.strip()):
        raise ClusterError(f"{name} is {text!r}; it must be a number from 0 on")
    return int(text)


def _explicit(env: Mapping[str, str]) -> Processes | None:
    if "SCL_PROCESSES" not in env and "SCL_PROCESS" not in env:
        return None  # SCL_COORDINATOR alone tells the sources below where the first process is
    count, index = _number(env, "SCL_PROCESSES"), _number(env, "SCL_PROCESS")
    return from_flags(env.get("SCL_COORDINATOR", ""), count, index, "SCL_COORDINATOR, SCL_PROCESSES, SCL_PROCESS")


def _tpu(env: Mapping[str, str]) -> Processes | None:
    if "TPU_WORKER_HOSTNAMES" not in env:
        return None
    hosts = [host.strip().partition(":")[0] for host in env["TPU_WORKER_HOSTNAMES"].split(",") if host.strip()]
    count, index, first = len(hosts), _number(env, "TPU_WORKER_ID"), hosts[0] if hosts else ""
    if "MEGASCALE_NUM_SLICES" in env:  # several slices, all of the same number of hosts
        index += _number(env, "MEGASCALE_SLICE_ID") * count
        count *= _number(env, "MEGASCALE_NUM_SLICES")
        first = env.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0]
    return Processes(env.get("SCL_COORDINATOR") or f"{first}:{TPU_PORT}", count, index, "TPU_WORKER_HOSTNAMES")


def _open_mpi(env: Mapping[str, str]) -> Processes | None:
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    count, index = _number(env, "OMPI_COMM_WORLD_SIZE"), _number(env, "OMPI_COMM_WORLD_RANK")
    here, local = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE"), _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")  # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911": of mpirun's host
    launcher = re.search(r"tcp://([\d.]+)", uri)
    job = int(uri.partition(".")[0]) if re.match(r"\d+\.", uri) else 0
    if env.get("SCL_COORDINATOR"):
        coordinator = env["SCL_COORDINATOR"]
    elif here == count:
        coordinator = f"localhost:{_port(job)}"
    elif launcher:
        coordinator = f"{launcher[1]}:{_port(job)}"
    else:
        raise ClusterError("Open MPI does not say where its first process runs; set SCL_COORDINATOR=host:port for all")
    return Processes(coordinator, count, index, "Open MPI", _own_device(env, here, local))


def _slurm(env: Mapping[str, str]) -> Processes | None:
    if "SLURM_PROCID" not in env or "SLURM_STEP_NODELIST" not in env:
        return None  # the batch script itself: no task that srun started
    count, index = _number(env, "SLURM_NTASKS"), _number(env, "SLURM_PROCID")
    port = _port(_number(env, "SLURM_JOB_ID"))
    coordinator = env.get("SCL_COORDINATOR") or f"{first_node(env['SLURM_STEP_NODELIST'])}:{port}"
    here = _tasks_of_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(env.get("SLURM_NODEID", "0")))
    return Processes(coordinator, count, index, "Slurm", _own_device(env, here, int(env.get("SLURM_LOCALID", "0"))))


def first_node(nodes: str) -> str:
    """The first host of Slurm's compact list: `gpu[003-010,012],login1` → `gpu003`, `r[1-2]n[1-4]` → `r1n1`.

    Raises:
        ClusterError: no host can be read from it.
    """
    found = re.match(r"(?:[\w.\-]|\[\w[^\]]*\])+(?=,|$)", nodes)  # up to the first comma that is in no brackets
    if not found:
        raise ClusterError(f"SLURM_STEP_NODELIST is {nodes!r}; no host can be read from it")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0])


def _tasks_of_node(counts: str, node: int) -> int:
    """`2(x3),1`: two tasks on each of three nodes, then one."""
    tasks = [
        int(found[1])
        for part in counts.split(",")
        if (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()))
        for _ in range(int(found[2] or 1))
    ]
    return tasks[node] if node < len(tasks) else 1


def _own_device(env: Mapping[str, str], processes_here: int, local: int) -> tuple[int, ...] | None:
    """Processes that share a host take a GPU each, unless the launcher has already shown each its own only."""
    visible = [device for device in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    shared = processes_here > 1 and len(visible) >= processes_here
    return (local,) if shared and len(visible) > 1 else None


def _port(job: int) -> int:
    """A port that the processes of one job agree on, and two jobs on one host rarely share."""
    return PORTS[0] + job % PORTS[1]


def on_tpu_vm() -> bool:
    """Whether chips and their library are here; the metadata of the VM then names the other hosts."""
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and importlib.util.find_spec("libtpu") is not None


def connect(processes: Processes | None, *, start_timeout: int, heartbeat_timeout: int, stop_timeout: int) -> None:
    """Joins the run's processes, before any device is touched; nothing happens where there is only one.

    Args:
        processes: from `from_flags` or `from_environment`.
        start_timeout: seconds that the processes wait for each other at the start.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead and the others end.
        stop_timeout: seconds that they wait for each other at the end.

    Raises:
        RuntimeError: the others did not come within `start_timeout`.
    """
    timeouts: dict[str, Any] = {
        "initialization_timeout": start_timeout,
        "heartbeat_timeout_seconds": heartbeat_timeout,
        "shutdown_timeout_seconds": stop_timeout,
    }
    if processes is not None:
        _join(processes, timeouts)
    elif on_tpu_vm() and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        jax.distributed.initialize(**timeouts)
    else:
        return
    # checkpoints, too, meet by way of the first process: a collective of the devices has no patience
    flags.FLAGS.experimental_orbax_use_distributed_barrier = True


def _join(processes: Processes, timeouts: dict[str, Any]) -> None:
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            local_device_ids=processes.local_devices,
            cluster_detection_method="deactivate",
            **timeouts,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"process {processes.index} of {processes.count} ({processes.source}) did not meet the others at "
            f"{processes.coordinator} within {timeouts['initialization_timeout']} s: are all of them running, can they "
            f"reach that host and port, and is the number right? {str(error).splitlines()[0]}"
        ) from error


def meet(name: str, timeout: int) -> None:
    """Waits until every process has come here, `timeout` seconds at most, without using a device.

    Raises:
        jax.errors.JaxRuntimeError: one did not come.
    """
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))  # named, or Orbax takes a collective of the devices
        multihost.sync_global_processes(name, timeout=timeout, processes=everyone)


_TEXTS = itertools.count()


def share(text: str, timeout: int) -> list[str]:
    """The texts that all processes give, in their order; waits for the others, `timeout` seconds at most.

    Raises:
        jax.errors.JaxRuntimeError: one did not come.
    """
    if jax.process_count() == 1:
        return [text]
    meet(f"text {next(_TEXTS)} is there", timeout)
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine))).tolist()
    rows = multihost_utils.process_allgather(np.pad(mine, (0, max(sizes) - len(mine))))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


class CompiledTogether:
    """Has every process compile a step before any runs it, `timeout` seconds apart at most.

    Else the first to run would wait inside a collective for one that still compiles, and give up (Gloo: after 30 s).
    """

    def __init__(self, timeout: int):
        self._timeout = timeout
        self._kinds: set[Any] = set()

    def __call__(self, step: Any, state: Any, batch: Batch, active: tuple[str, ...]) -> None:
        """Compiles the step for a new kind of batch; calling it then compiles nothing."""
        kind = (batch.pixels.shape, active)
        if jax.process_count() == 1 or kind in self._kinds:
            return
        step.lower(state, batch, active).compile()
        meet(f"compiled step {len(self._kinds)}", self._timeout)
        self._kinds.add(kind)


def end_at_sigterm() -> None:
    """Gives SIGTERM its usual effect for the rest of the process, exit status 143: behind the training loop, where
    nothing is left to save and nobody asks JAX's handler, which many processes have, what it noted.
    """
    if jax.process_count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class EndAtOnce:
    """A context whose error ends this process at once where there are others, so that they notice and end, too.

    The ordinary way out waits for all processes, and those that still train never come.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or jax.process_count() == 1:
            return
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, SystemExit):
            print(f"{who}: {error.code}", file=sys.stderr)
        else:
            traceback.print_exception(error)
            if isinstance(error, jax.errors.JaxRuntimeError):
                print(
                    f"{who} ends: its last step failed, most likely because another process died; the log of the one "
                    "that ended first says why. The same command continues from the newest checkpoint.",
                    file=sys.stderr,
                )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
