"""Looks at every option before anything is compiled, and reports all that cannot work at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from scl_jax.config import ConfigError, active_streams
from scl_jax.task_config import check_task, group_option, group_size


def check(config: ConfigDict, vocab_size: int, devices: int = 1, processes: int = 1) -> None:
    """Looks at every option before anything is compiled.

    Args:
        vocab_size: the tokenizer's.
        devices, processes: that the run will use.

    Raises:
        ConfigError: names every option that cannot work, why, and what to do.
    """
    problems = [*check_task(config), *_check_model(config, vocab_size), *_check_training(config)]
    problems += _check_mesh(config, devices, processes)
    for name in active_streams(config):
        problems += _check_stream(config, name, devices)
    if problems:
        raise ConfigError(f"the config has {len(problems)} problem(s):\n  " + "\n  ".join(problems))


def _unless(condition: Any, problem: str) -> list[str]:
    return [] if condition else [problem]


def _check_model(config: ConfigDict, vocab_size: int) -> Iterator[str]:
    m = config.model
    for part in ("vision", "text", "fusion"):
        width, heads = m[part].width, m[part].heads
        yield from _unless(
            heads > 0 and width % heads == 0, f"model.{part}: width {width} does not divide by heads {heads}"
        )
        yield from _unless(m[part].layers > 0, f"model.{part}.layers is {m[part].layers}; it must be at least 1")
    yield from _unless(
        m.vision.patch_size >= 1 and m.vision.image_size % m.vision.patch_size == 0,
        f"model.vision.image_size {m.vision.image_size} does not divide by patch_size {m.vision.patch_size}",
    )
    yield from _unless(m.remat in ("none", "dots", "full"), f"model.remat is {m.remat!r}; choose none, dots or full")
    yield from _unless(
        m.attention in ("auto", "xla", "cudnn"), f"model.attention is {m.attention!r}; choose auto, xla or cudnn"
    )
    yield from _unless(m.unroll >= 1, f"model.unroll is {m.unroll}; 1 means a loop over single layers")
    half = m.dtype == "bfloat16"
    yield from _unless(half or m.attention != "cudnn", f"model.attention=cudnn needs bfloat16, not {m.dtype}")
    yield from _unless(m.dtype in ("float32", "bfloat16"), f"model.dtype is {m.dtype!r}; choose float32 or bfloat16")
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
    yield from _unless(config.data.text_length >= 3, "data.text_length must be at least 3 (<s>, a token, </s>)")


def _check_training(config: ConfigDict) -> Iterator[str]:
    t, o = config.train, config.optimizer
    yield from _unless(
        active_streams(config), "no data: name data sets in data.images.datasets or data.videos.datasets"
    )
    yield from _unless(t.steps >= 1, f"train.steps is {t.steps}")
    yield from _unless(t.accumulate >= 1, f"train.accumulate is {t.accumulate}; 1 means no accumulation")
    yield from _unless(
        o.decay in ("linear", "cosine", "constant"),
        f"optimizer.decay is {o.decay!r}; choose linear, cosine or constant",
    )
    yield from _unless(0 <= o.ema < 1, f"optimizer.ema is {o.ema}; it is a decay from 0 (off) to below 1")
    yield from _unless(config.log.every >= 1, f"log.every is {config.log.every}")
    yield from _unless(t.checkpoint_every >= 1, f"train.checkpoint_every is {t.checkpoint_every}")
    yield from _unless(
        config.evaluate.every >= 0, f"evaluate.every is {config.evaluate.every}; 0 means only at the end"
    )
    for name, objective in config.objectives.items():
        if isinstance(objective, ConfigDict):
            sound = objective.weight >= 0 and objective.start >= 0 and objective.ramp >= 0
            yield from _unless(sound, f"objectives.{name}: weight, start and ramp must not be negative")
    ratios = (("global_vision", "drop_ratio"), ("local_vision", "replace_ratio"), ("masked_language", "mask_ratio"))
    for name, option in ratios:
        ratio = config.objectives[name][option]
        yield from _unless(0 < ratio < 1, f"objectives.{name}.{option} is {ratio}; it must lie between 0 and 1")
    ratio = config.objectives.text_mask_ratio
    yield from _unless(0 < ratio < 1, f"objectives.text_mask_ratio is {ratio}; it must lie between 0 and 1")
    for name in ("global_vision", "global_text", "local_vision", "local_text"):
        temperature = config.objectives[name].temperature
        yield from _unless(temperature > 0, f"objectives.{name}.temperature is {temperature}; it must be positive")
    yield from _unless(o.warmup >= 0, f"optimizer.warmup is {o.warmup}; it is a share or a number of steps")
    yield from _unless(t.keep_latest >= 1, f"train.keep_latest is {t.keep_latest}; the newest checkpoint must be kept")
    for name, seconds in config.distributed.items():
        yield from _unless(seconds >= 1, f"distributed.{name} is {seconds}; it must be at least a second")
    yield from _unless(config.data.threads >= 1, f"data.threads is {config.data.threads}; it must be at least 1")


def _check_mesh(config: ConfigDict, devices: int, processes: int) -> Iterator[str]:
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    known = math.prod(size for size in sizes if size != -1)
    sound = sizes.count(-1) <= 1 and all(size == -1 or size >= 1 for size in sizes)
    fits = sound and (devices % known == 0 if -1 in sizes else devices == known)
    yield from _unless(
        fits, f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} does not fit {devices} device(s)"
    )
    batch = config.evaluate.batch_size
    across = devices // max(config.mesh.tensor, 1)
    yield from _unless(
        batch > 0 and across and batch % across == 0 and batch % processes == 0,
        f"evaluate.batch_size {batch} does not divide by the {across} device(s) it is split over",
    )


def _check_stream(config: ConfigDict, name: str, devices: int) -> Iterator[str]:
    stream, model = config.data[name], config.model
    where = f"data.{name}"
    whole = group_size(config)
    if min(stream.batch_size, whole, model.vision.patch_size, config.train.accumulate) < 1:
        yield f"{where}: batch_size, {group_option(config.task)}, patch_size and train.accumulate must be at least 1"
        return
    across = max(devices // max(config.mesh.tensor, 1), 1)
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
        1 <= stream.frames <= model.vision.max_frames,
        f"{where}.frames is {stream.frames}, but model.vision.max_frames (temporal rows) is {model.vision.max_frames}",
    )
    patches = (stream.image_size // model.vision.patch_size) ** 2
    kept = int(patches * (1 - config.objectives.global_vision.drop_ratio))
    yield from _unless(
        kept >= 1 or config.task != "pretrain",
        f"{where}: of {patches} patches none survives objectives.global_vision.drop_ratio",
    )
    yield from _unless(
        stream.flip in ("never", "unless_sided", "always"),
        f"{where}.flip is {stream.flip!r}; choose never, unless_sided or always",
    )
    yield from _unless(
        stream.resize in ("bicubic", "fast"), f"{where}.resize is {stream.resize!r}; choose bicubic or fast"
    )
