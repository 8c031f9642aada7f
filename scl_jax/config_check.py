"""Looks at every option before anything is compiled, and reports all that cannot work at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from scl_jax.config import ConfigError, active_streams, default_config
from scl_jax.config_ranges import out_of_range
from scl_jax.task_config import check_task, group_option, group_size


def check(
    config: ConfigDict,
    vocab_size: int,
    devices: int = 1,
    processes: int = 1,
    others: Sequence[str] = (),
) -> None:
    """Looks at every option before anything is compiled.

    Args:
        vocab_size: the tokenizer's; 0: not known.
        devices, processes: that the run will use.
        others: problems that the config alone does not show, for the same report.

    Raises:
        ConfigError: names every option that cannot work, why, and what to do.
    """
    wrong = out_of_range(config)
    config = _with_defaults(config, list(wrong))  # so that pairs of the other options can be looked at
    pairs = [*check_task(config), *_check_model(config, vocab_size), *_check_training(config)]
    pairs += _check_mesh(config, devices, processes)
    for name in active_streams(config):
        pairs += _check_stream(config, name, devices)
    # what is said of a default is no problem of the user's
    problems = [*wrong.values(), *(pair for pair in pairs if not any(name in pair for name in wrong)), *others]
    if problems:
        raise ConfigError(f"the config has {len(problems)} problem(s):\n  " + "\n  ".join(problems))


def _with_defaults(config: ConfigDict, names: list[str]) -> ConfigDict:
    if not names:
        return config
    config, defaults = config.copy_and_resolve_references(), default_config()
    with config.ignore_type(), config.unlocked():
        for name in names:
            *parents, last = name.split(".")
            place, default = config, defaults
            for parent in parents:
                place, default = place[parent], default[parent]
            place[last] = default[last]
    return config


def _unless(condition: Any, problem: str) -> list[str]:
    return [] if condition else [problem]


def _check_model(config: ConfigDict, vocab_size: int) -> Iterator[str]:
    m = config.model
    for part in ("vision", "text", "fusion"):
        width, heads = m[part].width, m[part].heads
        yield from _unless(width % heads == 0, f"model.{part}: width {width} does not divide by heads {heads}")
    yield from _unless(
        m.vision.image_size % m.vision.patch_size == 0,
        f"model.vision.image_size {m.vision.image_size} does not divide by patch_size {m.vision.patch_size}",
    )
    half = m.dtype == "bfloat16"
    kernels = m.attention in ("cudnn", "fused", "mosaic")
    yield from _unless(half or not kernels, f"model.attention={m.attention} needs bfloat16, not {m.dtype}")
    yield from _unless(
        vocab_size <= m.text.vocab_size,
        f"model.text.vocab_size is {m.text.vocab_size}, but the tokenizer has {vocab_size} tokens; "
        "raise it, or set 0 to take the tokenizer's",
    )
    yield from _unless(
        config.data.text_length + 2 <= m.text.max_positions,
        f"data.text_length {config.data.text_length} needs model.text.max_positions of at least "
        f"{config.data.text_length + 2}, which is {m.text.max_positions}",
    )
    bounds = config.objectives.contrastive
    low, high = bounds.temperature_min, bounds.temperature_max
    yield from _unless(low <= high, f"objectives.contrastive.temperature_min {low} is above temperature_max {high}")
    yield from _unless(
        low <= m.initial_temperature <= high or low > high or config.reference_behaviour.unbounded_temperature,
        f"model.initial_temperature {m.initial_temperature} lies outside of objectives.contrastive.temperature_min "
        f"and temperature_max, {low} to {high}",
    )


def _check_training(config: ConfigDict) -> Iterator[str]:
    e = config.evaluate
    yield from _unless(
        active_streams(config), "no data: name data sets in data.images.datasets or data.videos.datasets"
    )
    yield from _unless(
        not e.best or (e.every and config.train.best_metric),
        "evaluate.best is on; it needs evaluations while training (evaluate.every above 0) and train.best_metric",
    )
    yield from _unless(
        not e.best or config.train.keep_best >= 1,
        f"evaluate.best is on, but train.keep_best is {config.train.keep_best}: the best checkpoint would be removed; "
        "it must be at least 1",
    )
    if config.task == "pretrain":
        on = [o for o in config.objectives.values() if isinstance(o, ConfigDict) and o.weight > 0]
        yield from _unless(on, "every objective has weight 0: nothing would be trained")
        first = min((objective.start for objective in on), default=0)
        yield from _unless(
            first == 0, f"no objective takes part before step {first}: objectives.<name>.start of one must be 0"
        )
        group = min(group_size(config), e.batch_size)
        yield from _unless(
            e.batch_size % group == 0,
            f"evaluate.batch_size {e.batch_size} does not divide into whole groups ({group_option(config.task)} "
            f"{group}); the next that does is {-(-e.batch_size // group) * group}",
        )


def _check_mesh(config: ConfigDict, devices: int, processes: int) -> Iterator[str]:
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    known = math.prod(size for size in sizes if size != -1)
    sound = sizes.count(-1) <= 1 and all(size == -1 or size >= 1 for size in sizes)
    fits = sound and (devices % known == 0 if -1 in sizes else devices == known)
    yield from _unless(
        fits, f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} does not fit {devices} device(s)"
    )
    batch, across = config.evaluate.batch_size, _across(config, devices)
    yield from _unless(
        batch % across == 0 and batch % processes == 0,
        f"evaluate.batch_size {batch} does not divide by the {across} device(s) it is split over",
    )


def _across(config: ConfigDict, devices: int) -> int:
    """The devices that a batch is split over: all but those of "tensor"; 1 where the mesh does not fit."""
    mesh = config.mesh
    if mesh.tensor == -1:  # takes what the others leave
        return max(mesh.data * mesh.fsdp, 1)
    return max(devices // max(mesh.tensor, 1), 1)


def _check_stream(config: ConfigDict, name: str, devices: int) -> Iterator[str]:
    stream, model = config.data[name], config.model
    where = f"data.{name}"
    whole = group_size(config)
    across = _across(config, devices)
    pieces = across * config.train.accumulate
    yield from _unless(
        stream.batch_size % pieces == 0,
        f"{where}.batch_size {stream.batch_size} does not divide by {across} device(s) × train.accumulate "
        f"{config.train.accumulate}; the next that does is {-(-stream.batch_size // pieces) * pieces}",
    )
    group = min(whole, stream.batch_size)
    yield from _unless(
        stream.batch_size % (group * config.train.accumulate) == 0,
        f"{where}.batch_size {stream.batch_size} does not divide into train.accumulate {config.train.accumulate} "
        f"micro-batches of whole groups ({group_option(config.task)} {whole})",
    )
    yield from _unless(
        stream.image_size % model.vision.patch_size == 0,
        f"{where}.image_size {stream.image_size} does not divide by model.vision.patch_size {model.vision.patch_size}",
    )
    yield from _unless(
        stream.frames <= model.vision.max_frames,
        f"{where}.frames is {stream.frames}, but model.vision.max_frames (temporal rows) is {model.vision.max_frames}",
    )
    patches = (stream.image_size // model.vision.patch_size) ** 2
    kept = int(patches * (1 - config.objectives.global_vision.drop_ratio))
    yield from _unless(
        kept >= 1 or config.task != "pretrain",
        f"{where}: of {patches} patches none survives objectives.global_vision.drop_ratio",
    )
    replaced = int(patches * config.objectives.local_vision.replace_ratio)
    yield from _unless(
        replaced >= 1 or config.task != "pretrain" or not config.objectives.local_vision.weight,
        f"{where}: of {patches} patches objectives.local_vision.replace_ratio replaces none",
    )
