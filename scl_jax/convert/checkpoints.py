"""Parameters alone in the layout of a training run: <folder>/config.json and <folder>/checkpoints/<step>/state."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from scl_jax.models import parameters
from scl_jax.training.checkpoint import UNREADABLE, CheckpointError, Checkpoints, first_line, steps_in
from scl_jax.training.state import TrainState
from scl_jax.training.workdir import LOCK

CONVERTED = ("config.json", "checkpoints")  # in every folder that holds parameters alone
RUN_FILES = ("metrics.jsonl", LOCK)  # what only training leaves beside them
_HEADROOM = 1.1  # disk space wanted, as a multiple of the weights


def is_run(path: Path) -> bool:
    """Does the folder hold checkpoints of this library?"""
    return bool(steps_in(path / "checkpoints"))


def write_parameters(folder: Path, flat: Mapping[str, np.ndarray]) -> None:
    """Writes <folder>/checkpoints/0 with these parameters and no optimizer state."""
    checkpoints = Checkpoints(folder / "checkpoints")
    params: Any = parameters.unflatten(flat)
    checkpoints.save(0, TrainState(np.zeros([], np.int32), params, ()), {})  # type: ignore[arg-type]
    checkpoints.wait()
    checkpoints.close()


def read_parameters(folder: Path, step: int | None = None) -> tuple[dict[str, np.ndarray], int]:
    """The parameters (their running average where there is one) of a step, the newest by default, and that step.

    Raises:
        FileNotFoundError: there is no such checkpoint. CheckpointError: it cannot be read.
    """
    steps = sorted(int(path.name) for path in folder.glob("checkpoints/[0-9]*") if path.name.isdigit())
    if not steps or (step is not None and step not in steps):
        there = f"it holds the steps {', '.join(map(str, steps))}" if steps else "there is no checkpoint in it"
        raise FileNotFoundError(f"{folder}: no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    step = steps[-1] if step is None else step
    state = folder.absolute() / "checkpoints" / str(step) / "state"
    try:
        return _restored(state), step
    except UNREADABLE as error:
        others = ", ".join(str(other) for other in steps if other != step)
        hint = f"name another step (there are {others})" if others else "there is no other step"
        raise CheckpointError(
            f"{state} cannot be read ({first_line(error)}). If it is damaged, or was not copied whole: {hint}"
        ) from error


def _restored(state: Path) -> dict[str, np.ndarray]:
    """The parameters in the folder of a state, or their running average, by dotted path."""
    with ocp.PyTreeCheckpointer() as reader:
        metadata: Any = reader.metadata(state).item_metadata
        if metadata is None:  # Orbax finds its own files missing or cut
            raise ValueError("it does not say which arrays it holds")
        part = "ema" if metadata["ema"] else "params"
        wanted = {part: metadata[part]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        options = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        restored = reader.restore(state, args=options)
    return parameters.flatten(restored[part])


def checksum(flat: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and bytes: equal for equal parameters, whatever file they came from."""
    digest = hashlib.sha256()
    for path in sorted(flat):
        value = np.ascontiguousarray(flat[path])
        digest.update(f"{path} {value.shape} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_target(target: Path, overwrite: bool, marks: Sequence[str], sources: Sequence[Path | str]) -> None:
    """Whether a folder may be written, and what is there replaced: an empty folder, or one that holds `marks`.

    Args:
        marks: the names in every folder that the caller writes; others, and runs of training, are never replaced.
        sources: what is read, files or folders (or names on the hub): none may lie in the target.

    Raises:
        FileExistsError: there is a target, and it may not be overwritten.
        ValueError: the target holds a source, which would be lost.
    """
    place = target.resolve()
    for source in sources:
        origin = Path(os.path.expanduser(source)).resolve()
        if place == origin or place in origin.parents:
            raise ValueError(f"{target} is or holds {source}, which is read: choose another target")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if any((target / name).exists() for name in RUN_FILES) or not all((target / name).exists() for name in marks):
        raise FileExistsError(
            f"{target} exists, and is no folder of {' and '.join(marks)} that could be replaced: choose another target"
        )
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another target, or give --overwrite")


@contextlib.contextmanager
def beside(
    target: Path, overwrite: bool, size: int, marks: Sequence[str], sources: Sequence[Path | str]
) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place at the end; nothing is left behind after an error.

    Args:
        size: bytes that will be written, about.
        marks, sources: see `check_target`.

    Raises:
        FileExistsError, ValueError: there is a target that may not be replaced.
        OSError: not enough space, or the writing failed.
    """
    check_target(target, overwrite, marks, sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < size * _HEADROOM:
        raise OSError(
            f"{target}: {size / 2**20:.0f} MiB are to be written, but the disk has {free / 2**20:.0f} MiB left"
        )
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except (OSError, jax.errors.JaxRuntimeError) as error:
        raise OSError(f"{target}: could not be written ({error}); nothing was left") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():  # the second rename failed
            old.rename(target)
