"""What a config names outside of itself: is it there, and does it work? Looked at before the step is compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TypeVar

import jax
from ml_collections import ConfigDict

from scl_jax import build
from scl_jax.config import active_streams
from scl_jax.convert.sources import locate
from scl_jax.data.builders import open_source
from scl_jax.kernel_check import attention_problems

T = TypeVar("T")
MODES = ("train", "evaluate", "replay")


def tried(problems: list[str], make: Callable[[], T], default: T) -> T:
    """What `make` returns; where something is missing or wrong, the default, and one problem more."""
    try:
        return make()
    except (FileNotFoundError, ValueError) as error:
        problems.append(str(error))
        return default


def missing(config: ConfigDict, mode: str, continued: bool) -> list[str]:
    """What is not there of data sets, weights and packages that a run in this mode will ask for, soon or at its end.

    continued: whether the work directory holds a checkpoint, so that `config.init` is not read.
    """
    problems: list[str] = []
    whole = config.data.bad_records == "fail"  # else a broken shard is among what is left out
    for name, split in _splits(config, mode):
        tried(problems, lambda name=name, split=split: open_source(name, split, config.data.dir, whole=whole), None)
    for option, source in () if continued else config.init.items():
        if source:
            found: list[str] = []
            tried(found, lambda source=source: locate(source), None)
            problems += [f"init.{option}: {problem}" for problem in found]
    project = config.log.wandb_project
    if project and importlib.util.find_spec("wandb") is None:
        problems.append(f"log.wandb_project={project!r} needs wandb: pip install wandb, or leave it empty")
    if jax.default_backend() == "tpu" and build.attention(config) == "mosaic":
        problems += attention_problems()
    return list(dict.fromkeys(problems))


def evaluated_datasets(config: ConfigDict, stream: str) -> list[str]:
    """The data sets of a stream that are evaluated: its own, those that are trained on, unless it names others."""
    data = config.data[stream]
    return [name for name in data.evaluation_datasets if name] or [name for name in data.datasets if name]


def weighs(config: ConfigDict) -> bool:
    """Whether the final evaluation looks at `evaluate.split` too, to choose among `evaluate.matching_weights`."""
    return config.task == "pretrain" and len(config.evaluate.matching_weights) > 1


def _splits(config: ConfigDict, mode: str) -> list[tuple[str, str]]:
    """(data set, split) of all that is read."""
    e, found = config.evaluate, []
    for stream in active_streams(config):
        datasets = [name for name in config.data[stream].datasets if name]
        evaluated = evaluated_datasets(config, stream)
        if mode in ("train", "replay"):
            found += [(name, "train") for name in datasets]
        if (mode == "train" and e.every) or (mode != "replay" and weighs(config)):
            found += [(name, e.split) for name in evaluated]
        if mode in ("train", "evaluate"):
            found += [(name, e.final_split) for name in evaluated]
    return found
