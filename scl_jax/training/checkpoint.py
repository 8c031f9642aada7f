"""Checkpoints: model, optimizer and place in the data in one Orbax save, asynchronous; the newest and the best kept.

<workdir>/checkpoints/<step>/state/      the TrainState, sharded
<workdir>/checkpoints/<step>/progress/   JSON: the data iterator and the metrics since the last line of the log
<workdir>/checkpoints/<step>/metrics/    the evaluation at that step, where there was one
<workdir>/broken_checkpoints/<step>/     what could not be read when the run continued, set aside

A save is written under another name and renamed when it is whole, so a process may die at any moment.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from scl_jax.training import orbax_changes
from scl_jax.training.distributed import meet
from scl_jax.training.state import TrainState

orbax_changes.apply()

# how damaged files show: missing (OSError), cut short or no JSON (ValueError), missing keys, errors of the runtime
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
MEETING = 300  # seconds that processes wait for the first one to do so
# errors of the system that say nothing of the files, and what libraries put into their messages of such
NOT_DAMAGE = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM),
    *(errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN),
)
NOT_DAMAGE_WORDS = (
    *("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *("Out of memory", "can't start new thread"),
    *map(os.strerror, NOT_DAMAGE),
)
NO_SPACE = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file is too large"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message says which, why, and what is left."""


class KeepBefore(checkpoint_managers.PreservationPolicy):
    """Preserves the newest checkpoint before each of `steps`: what `scl_jax.replay` starts from."""

    def __init__(self):
        self.steps: set[int] = set()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Of every checkpoint, whether it is kept for this."""
        there = [info.step for info in checkpoints]
        kept = {max((step for step in there if step < wanted), default=None) for wanted in self.steps}
        return [step in kept for step in there]


class Checkpoints:
    """The checkpoints of one work directory.

    Args:
        folder: <workdir>/checkpoints, made when missing.
        keep_latest, keep_best: how many of the newest, and of the best by `best_metric`, are kept.
        read_only: nothing is written, removed or set aside, so that a run may be using the folder.
    """

    def __init__(
        self,
        folder: Path | str,
        keep_latest: int = 2,
        keep_best: int = 1,
        best_metric: str = "",
        read_only: bool = False,
    ):
        def score(metrics: Mapping[str, float]) -> float:
            return metrics.get(best_metric, -math.inf)  # an older checkpoint may have been scored by another

        self._before = KeepBefore()
        policies: list[Any] = [checkpoint_managers.LatestN(n=keep_latest), self._before]
        if keep_best and best_metric:
            best = {"get_metric_fn": score, "n": keep_best, "keep_checkpoints_without_metrics": False}
            policies.append(checkpoint_managers.BestN(**best))
        self._best_metric, self._folder, self._read_only = best_metric, Path(folder).absolute(), read_only
        self.notes: list[str] = []  # about checkpoints that were set aside
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            # without it, metrics are not written, and a restarted run forgets which checkpoint is the best
            best_fn=score if best_metric else None,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        reasons = {step: damage(self._folder / str(step)) for step in steps_in(self._folder)}
        whole = [step for step, reason in reasons.items() if not reason]
        if whole:  # else `restore` says that none can be read
            self._set_aside(reasons, whole[-1])
        self._open()

    def _open(self) -> None:
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=self._options)
        except UNREADABLE as error:
            raise CheckpointError(
                f"the checkpoints in {self._folder} cannot be opened ({first_line(error)})"
            ) from error

    def keep_before(self, step: int) -> None:
        """The newest checkpoint before this step is kept, until this is called for another."""
        self._before.steps = {step}

    def latest(self) -> int | None:
        """The newest step, None without any."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step whose `best_metric` is highest, the earliest of several; None where none was evaluated.

        Raises:
            CheckpointError: what was evaluated has other metrics only.
        """
        found = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scored = {step: metrics for step, metrics in found.items() if metrics}
        values = {step: metrics[self._best_metric] for step, metrics in scored.items() if self._best_metric in metrics}
        if scored and not values:
            raise CheckpointError(self._no_metric(scored[max(scored)]))
        return max(sorted(values), key=values.__getitem__, default=None)

    def _no_metric(self, metrics: Mapping[str, float]) -> str:
        names = ", ".join(sorted(metrics))
        return f"train.best_metric is {self._best_metric!r}, which no evaluation here has; they have {names}"

    def newest_before(self, step: int) -> int | None:
        """The newest checkpoint before a step, None without any."""
        return max((saved for saved in self._manager.all_steps() if saved < step), default=None)

    def save(
        self, step: int, state: TrainState, progress: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving; the state may be donated to the next step at once.

        Raises:
            CheckpointError: this or the previous save failed; earlier checkpoints are as they were. Or `metrics` lack
                `best_metric`; the checkpoint is whole then.
        """
        scored = {name: float(value) for name, value in metrics.items()} if metrics and self._best_metric else None
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with self._writing():
            if not self._manager.save(step, args=args, metrics=scored):
                raise CheckpointError(f"{self._folder} holds step {self.latest()}; step {step} is not after it")
        if scored is not None and self._best_metric not in scored:
            self.wait()
            raise CheckpointError(self._no_metric(scored))

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state, laid out as `abstract` (ShapeDtypeStructs with shardings), and the progress of a step.

        Where no step is named, the newest that can be read: damaged ones are set aside, and `notes` says so.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointError: the step that is named, or all of them, cannot be read; or one cannot be read for a reason
                that is no damage, such as too little memory: nothing is set aside for it.
        """
        if step is not None:
            restored, reason = self._try(abstract, step)
            if restored is None:
                raise CheckpointError(f"checkpoint {step} of {self._folder} cannot be read ({reason})")
            return restored
        reason = ""
        while (newest := self.latest()) is not None:
            restored, reason = self._try(abstract, newest)
            if restored is not None:
                return restored
            if self._read_only or self._manager.all_steps() == [newest]:  # the last one stays where it is
                break
            self._manager.close()
            self._set_aside({newest: reason})
            self._open()
        if reason:
            raise CheckpointError(
                f"no checkpoint of {self._folder} can be read; the last one tried: step {newest} ({reason})"
            )
        raise FileNotFoundError(f"no checkpoint in {self._folder}")

    def _try(self, abstract: TrainState, step: int) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """(state and progress) of a step, or (None, what is damaged); all processes agree."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        restored: Any = None
        reason, passing = "", False
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # Orbax raises plain ones, too; said, and an error where nothing else can be read
            other = no_damage(error)
            reason, passing = other or first_line(error), bool(other)
        if jax.process_count() > 1:
            failed, passing = multihost_utils.process_allgather(np.asarray([bool(reason), passing])).any(axis=0)
            reason = reason or ("another process cannot read it" if failed else "")
        if passing:
            raise CheckpointError(
                f"checkpoint {step} of {self._folder} cannot be read now ({reason}): that need not be damage, so it "
                "stays where it is; once the cause is removed the same command continues"
            )
        return (None, reason) if reason else ((restored.state, restored.progress), "")

    def _set_aside(self, reasons: Mapping[int, str], whole: int = -1) -> None:
        """Moves checkpoints that have a reason out of the way of the next ones of their steps, and notes it.

        whole: a checkpoint that is; most likely an older one was being removed when the run was killed.
        """
        aside = self._folder.parent / "broken_checkpoints"
        for step, reason in reasons.items() if jax.process_index() == 0 and not self._read_only else ():
            if reason:
                aside.mkdir(exist_ok=True)
                number = len(list(aside.glob(f"{step}*")))
                (self._folder / str(step)).rename(aside / (f"{step}.{number}" if number else str(step)))
                said = "cannot be read" if step > whole else f"(older than {whole}) was being removed, or is damaged"
                self.notes.append(f"checkpoint {step} {said} ({reason}): set aside in {aside}")
        meet("broken checkpoints are set aside", MEETING)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            left = [step for step in steps_in(self._folder) if _is_whole(self._folder / str(step))]
            whole = f"the newest whole checkpoint is step {left[-1]}" if left else "there is no earlier checkpoint"
            raise CheckpointError(
                f"a checkpoint could not be written to {self._folder}: {no_space(error) or first_line(error)}; "
                f"{whole}. The same command continues from there once there is room."
            ) from error

    def wait(self) -> None:
        """Until the last save is complete on disk.

        Raises:
            CheckpointError: it failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def completed(self) -> Iterator[None]:
        """A block whose errors wait for the save under way to become whole, and are then raised as they were.

        Of several processes none waits: the others may never come to the end of theirs.
        """
        try:
            yield
        except Exception:
            if jax.process_count() == 1:
                with suppress(Exception):  # the first error says more
                    self._manager.wait_until_finished()
            raise

    def close(self) -> None:
        self._manager.close()


def steps_in(folder: Path) -> list[int]:
    """The steps that have a checkpoint in <workdir>/checkpoints; what is still being written has another name."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def damage(folder: Path) -> str:
    """Why a checkpoint's small files are no whole checkpoint; empty: they are.

    Raises OSError where they are there and cannot be read, which is no damage.
    """
    for item in ("state", "progress"):
        if not (folder / item).is_dir():
            return f"{item} is missing"
    for file in (folder / "_CHECKPOINT_METADATA", *folder.glob("*/metadata"), *folder.glob("metrics/metrics")):
        try:
            json.loads(file.read_text())
        except FileNotFoundError:
            return f"{file.name} is missing"
        except ValueError:
            return f"{file.relative_to(folder)} is no JSON"
    return ""


def _is_whole(folder: Path) -> bool:
    try:
        return not damage(folder)
    except OSError:
        return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def no_damage(error: BaseException) -> str:
    """The first line of the cause of an error that says nothing of the files, as too little memory; else empty."""
    for cause in _causes(error):
        system = isinstance(cause, MemoryError | TimeoutError) or getattr(cause, "errno", None) in NOT_DAMAGE
        if system or any(words in str(cause) for words in NOT_DAMAGE_WORDS):
            return first_line(cause)
    return ""


def no_space(error: BaseException | None) -> str:
    """ "the disk is full" and the like, where that is the cause of an error; else empty."""
    for cause in _causes(error):
        for number, words in NO_SPACE.items():
            if getattr(cause, "errno", None) == number or errno_text(number) in str(cause):
                return words
    return ""


def errno_text(number: int) -> str:
    """What the system calls an error, as libraries put it into their messages."""
    return {
        errno.ENOSPC: "No space left on device",
        errno.EDQUOT: "Disk quota exceeded",
        errno.EFBIG: "File too large",
    }[number]


def first_line(error: BaseException) -> str:
    """The kind and the first line of the error that caused an error, no longer than a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, types and shardings of a state."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
