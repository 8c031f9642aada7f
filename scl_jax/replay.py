"""Looks at a step again: `python -m scl_jax.replay <workdir> [--step=N]`, the last that was not finite by default.

The run is continued in memory, bit for bit, from the newest checkpoint before the step, and the step's batch and masks
are made again. For every objective it prints loss, weight and norm of the gradient, and for those that are not finite
the first operation that gave NaN. Nothing is written; a run may be using the work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from scl_jax.config import config_of_run
from scl_jax.data.records import NOTHING, LeftOut, Records
from scl_jax.session import Session
from scl_jax.training import sharding
from scl_jax.training.checkpoint import Checkpoints, abstract_state
from scl_jax.training.inspection import Finding, described, of_parameters
from scl_jax.training.loop import Fed, Feed
from scl_jax.training.nonfinite import read_record, records
from scl_jax.types import Batch

SHOWN = 32  # examples that are listed


def replay(session: Session, step: int | None = None) -> tuple[list[Finding], list[str]]:
    """Goes through a step of a run again.

    Args:
        session: of the work directory.
        step: as metrics.jsonl counts, from 1; None: the last one with a record.

    Returns:
        The findings by objective, and lines that say what they mean.

    Raises:
        ValueError: no step is named and none has a record.
    """
    folder = session.workdir / "nonfinite"
    known = records(folder)
    if step is None:
        if not known:
            raise ValueError(f"{folder} holds no record of a step that was not finite; name a step: --step=N")
        step = known[-1]
    if not 1 <= step <= session.config.train.steps:
        raise ValueError(f"--step is {step}; steps of this run are numbered 1 to {session.config.train.steps}")
    session.checkpoints = Checkpoints(session.workdir / "checkpoints", read_only=True)
    begun = session.checkpoints.newest_before(step)
    graph, tx, state = session.initial_state(fresh=begun is None)
    iterator = iter(session.training_data())
    if begun is not None:
        state, progress = session.checkpoints.restore(abstract_state(state), begun)
        iterator.set_state(progress["data"])
    print(f"from {'the start' if begun is None else f'checkpoint {begun}'} to step {step}", flush=True)
    feed, step_function = Feed(iterator, session.mesh), session.jit_step(graph, tx, state)
    for number in range(int(state.step), step - 1):
        state, _ = step_function(state, feed.take().batch, session.task.active(number))
    fed = feed.take()
    findings = session.inspection(graph)(state, fed.batch)
    return findings, [
        *described(findings),
        *of_parameters(state.params),
        *of_batch(session, fed.stream, fed.batch),
        *of_record(read_record(folder, step), fed),
    ]


PLATFORMS = {"mosaic": "tpu", "fused": "gpu", "cudnn": "gpu"}  # of kernels for attention


def on_devices_here(config: ConfigDict) -> ConfigDict:
    """The config of a run for this machine, whose devices may be fewer or others: masks and losses are the same."""
    if PLATFORMS.get(config.model.attention, jax.default_backend()) != jax.default_backend():
        config.model.attention = "auto"
    try:
        sharding.make_mesh(**config.mesh)
    except ValueError:
        print(f"the run's mesh does not fit {jax.device_count()} device(s): all of them share the batch", flush=True)
        config.mesh.update(data=-1, fsdp=1, tensor=1)
    return config


def of_batch(session: Session, stream: str, batch: Batch) -> list[str]:
    """The examples of a batch by data set and id, and numbers in it that are not finite."""
    items = np.asarray(batch.item_id).tolist()
    left_out: LeftOut = session.bad_records.left_out("train").get(stream, NOTHING)
    records = Records(session.config.data[stream].datasets, "train", session.config.data.dir, left_out)
    lines = [f"batch of {len(items)} {stream}:"]
    lines += [f"  row {row}: {records[item].origin}" for row, item in enumerate(items[:SHOWN]) if item >= 0]
    if len(items) > SHOWN:
        lines.append(f"  … and {len(items) - SHOWN} more")
    floats = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    bad = [name for name, x in floats.items() if x is not None and not bool(jnp.isfinite(x).all())]
    return [*lines, f"not finite in the batch itself: {', '.join(bad)}"] if bad else lines


def of_record(record: dict[str, Any] | None, fed: Fed) -> list[str]:
    """Whether the batch is the one that the run kept."""
    if record is None:
        return []
    same = record["item_id"] == np.asarray(fed.batch.item_id).tolist() and record["stream"] == fed.stream
    if not same:
        raise ValueError("the data gives another batch than the run had: its shards have changed")
    return ["the batch is the one of the run's record"]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m scl_jax.replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workdir", type=Path, help="of the run")
    parser.add_argument("--step", type=int, help="as metrics.jsonl counts; default: the last that was not finite")
    options = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.WARNING)
    try:
        config = on_devices_here(config_of_run(options.workdir))
        findings, lines = replay(Session(config, options.workdir, "replay"), options.step)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))
    sys.exit(0 if all(f.finite for f in findings) else 3)


if __name__ == "__main__":
    main()
