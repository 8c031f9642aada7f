"""Trains or evaluates: `python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`.

On several hosts the same command runs on each; who the others are, Slurm, Open MPI or the TPU says, or flags do.
"""

from __future__ import annotations

import os
import sys

from absl import app, flags, logging

from scl_jax.config_flag import CONFIG as _CONFIG
from scl_jax.config_flag import parse
from scl_jax.tpu_compiler import roomy_stacks

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, logs and results; a run there is continued.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "Train (then evaluate), or evaluate a checkpoint.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of the first process, where nothing else names it.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "How many processes run, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", -1, "Which one this is, from 0, with --coordinator.")
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "Exit status of training that SIGTERM or Ctrl-C ended early, saved; above 0 where a launcher takes 0 for complete.",
    lower_bound=0,
    upper_bound=255,
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {' '.join(argv[1:])}? Options are written --config.name=value")
    logging.set_verbosity(logging.WARNING)
    from scl_jax.training import distributed  # after the flags, so that --help is instant

    roomy_stacks()
    try:
        explicit = distributed.from_flags(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        wait = _CONFIG.value.distributed
        distributed.connect(
            explicit or distributed.from_environment(os.environ),
            start_timeout=wait.start_timeout,
            heartbeat_timeout=wait.heartbeat_timeout,
            stop_timeout=wait.stop_timeout,
        )
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    with distributed.EndAtOnce():
        complete = _run()
    return 0 if complete else _STOPPED_STATUS.value


# what helps where a device's memory is too small
LESS_MEMORY = (
    "model.remat=full computes most activations again; train.accumulate (in a new --workdir) takes a step in so many "
    "parts, with the same negatives and gradient; mesh.fsdp splits parameters over devices; evaluate.batch_size counts "
    "in evaluations"
)


def _run() -> bool:
    """Trains or evaluates; False where a signal ended training early."""
    import jax

    from scl_jax.compilation_cache import keep_compiled
    from scl_jax.host_memory import keep_freed
    from scl_jax.remat import out_of_memory
    from scl_jax.session import Session
    from scl_jax.training.checkpoint import no_space

    keep_compiled(_CONFIG.value.compilation_cache)
    keep_freed()
    try:
        session = Session(_CONFIG.value, str(_WORKDIR.value), _MODE.value)
        if _MODE.value == "train":
            return session.train()
        session.evaluate()
        return True
    except (ValueError, OSError) as error:
        full = "" if isinstance(error, ValueError) else no_space(error)
        then = f" ({full}: make room; the same command continues from the newest checkpoint)" if full else ""
        sys.exit(f"error: {error}{then}")
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        sys.exit(f"error: a device's memory is too small ({str(error).splitlines()[0]}): {LESS_MEMORY}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
