"""Every option of scl_jax with its default, its meaning and its checks.

A config file (`configs/*.py`) starts from `default_config()` and changes what differs. Overrides on the command line
(`--config.train.steps=10`) come after that; `finalize` then derives what follows from them and `check` reports
everything that cannot work, all at once, before anything is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from scl_jax.task_config import check_task, group_option, group_size, retrieval_defaults

STREAMS = ("images", "videos")


def default_config() -> ConfigDict:
    """The method at full size (ViT-B/16, RoBERTa-base, six fusion layers) with the paper's settings."""
    config = ConfigDict()
    config.task = "pretrain"  # pretrain | vqa | nlvr2 | entailment | retrieval
    config.seed = 0
    config.debug = False  # shrink model, data and steps for a smoke run of the same code
    config.model = _model()
    config.init = _init()
    config.objectives = _objectives()  # of pre-training
    config.retrieval = retrieval_defaults()
    config.reference_behaviour = _reference_behaviour()
    config.data = _data()
    config.optimizer = _optimizer()
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all devices that the others leave
    config.distributed = _distributed()
    config.train = _train()
    config.evaluate = _evaluate()
    config.log = _log()
    return config.lock()  # an unknown key is an error in a config file, too


def _model() -> ConfigDict:
    return ConfigDict(
        {
            "vision": {
                "width": 768,
                "layers": 11,  # CLIP ViT-B/16 has 12 blocks, the last one is dropped
                "heads": 12,
                "mlp_width": 3072,
                "patch_size": 16,
                "image_size": 288,  # of the position grid
                "max_frames": 8,  # rows of the temporal embedding
            },
            "text": {
                "width": 768,
                "layers": 12,
                "heads": 12,
                "mlp_width": 3072,
                "vocab_size": 50265,  # 0: the tokenizer's
                "max_positions": 514,
            },
            "fusion": {"width": 768, "layers": 6, "heads": 12, "mlp_width": 3072},
            "projection_width": 512,  # of the contrastive space
            "answers": 0,  # of visual questions; 0: those of the data set
            "dropout": 0.1,  # of the text and fusion layers; the vision encoder has none
            "attention_dropout": 0.1,  # of their attention weights
            "initial_temperature": 0.07,
            "dtype": "bfloat16",  # of activations; parameters, norms, softmax and losses stay float32
            "remat": "none",  # none | dots | full
        }
    )


def _init() -> ConfigDict:
    # what step 0 starts from instead of random weights: a path, or a name on the Hugging Face hub; empty: nothing
    return ConfigDict(
        {
            "checkpoint": "",  # a work directory, a folder of scl_jax.convert, or a PyTorch file of a whole model
            "vision": "",  # CLIP ViT: OpenAI's archive, or Hugging Face's CLIPModel or CLIPVisionModel
            "text": "",  # RoBERTa: Hugging Face's RobertaModel or RobertaForMaskedLM
        }
    )


def _objectives() -> ConfigDict:
    def objective(weight: float, **more) -> ConfigDict:
        # weight reached by a linear ramp of `ramp` steps that begins at step `start`; weight 0 switches it off
        return ConfigDict({"weight": weight, "start": 0, "ramp": 0, **more})

    return ConfigDict(
        {
            "contrastive": objective(0.5, temperature_min=0.01, temperature_max=1.0),
            "matching": objective(1.0, hard_negatives=0.0),  # share of the other images drawn by similarity
            "masked_language": objective(1.0, mask_ratio=0.15),
            "global_vision": objective(1.0, drop_ratio=0.8, temperature=0.03),
            "global_text": objective(1.0, temperature=0.03),
            "local_vision": objective(0.2, replace_ratio=0.3, temperature=0.03),
            "local_text": objective(0.2, temperature=0.03),
            "text_mask_ratio": 0.4,  # of the completion-masked text, shared by global_text and local_text
            "group_size": 16,  # samples among which local completion and matching draw their negatives
        }
    )


def _reference_behaviour() -> ConfigDict:
    # what the reference computes where it deviates from its paper (all off: the corrected behaviour)
    return ConfigDict(
        {
            "video_completion_norm_over_frames": False,  # similarities of video global completion are no cosines
            "unbounded_temperature": False,
            "decay_norms_and_temperature": False,  # weight decay on ViT and head LayerNorms and on the temperature
            "adam_eps_uncorrected": False,  # Adam's eps is added to the square root before bias correction
            "rank_head_like_encoders": False,  # the rank head learns at the encoders' rate
            "first_image_contrastive": False,  # retrieval's contrastive term sees the first image of a batch only
        }
    )


def _stream(**changes) -> ConfigDict:
    stream = ConfigDict(
        {
            "datasets": ("",),  # "toy_world/images", "own_data/my_set"; empty: this stream is off
            "evaluation_datasets": ("",),  # whose validation and test splits are evaluated; empty: `datasets`
            "batch_size": 4096,  # of one optimizer step, over all devices
            "share": 1.0,  # of the steps that take this stream
            "frames": 1,
            "image_size": 288,
            "resize": "bicubic",  # of training crops: bicubic | fast (an area filter: slightly other pixels)
            "crop_scale": (0.8, 1.0),
            "flip": "unless_sided",  # never | unless_sided (not when a caption says left or right) | always
            "rand_augment": (0, 0),  # (operations, magnitude)
        }
    )
    stream.update(changes)
    return stream


def _data() -> ConfigDict:
    return ConfigDict(
        {
            "dir": "data",  # where prepared shards lie: <dir>/<dataset>/<config>/<version>/
            "tokenizer": "roberta-base",  # a folder or a hub name; empty: <dir>/tokenizer
            "text_length": 50,  # tokens, <s> and </s> included
            "images": _stream(),
            "videos": _stream(batch_size=1024, frames=4, image_size=224, share=0.0),
            "threads": 8,
            "prefetch": 4,  # whole batches kept ready
        }
    )


def _optimizer() -> ConfigDict:
    return ConfigDict(
        {
            "learning_rate": 2e-5,
            "end_learning_rate": 0.0,
            "warmup": 0.1,  # a share of the steps, or a number of steps when above 1
            "decay": "linear",  # linear | cosine | constant
            "b1": 0.9,
            "b2": 0.98,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": 0.0,  # 0: no clipping
            "multiplier_fusion": 5.0,
            "multiplier_head": 5.0,
            "ema": 0.0,  # decay of the averaged parameters; 0: none
        }
    )


def _distributed() -> ConfigDict:
    # seconds that the processes of a run wait for each other before they end with an error
    return ConfigDict(
        {
            "start_timeout": 300,  # until all have come
            "compile_timeout": 3600,  # until all have compiled a step
            "heartbeat_timeout": 100,  # without a sign of life
            "stop_timeout": 300,  # until all have ended
        }
    )


def _train() -> ConfigDict:
    return ConfigDict(
        {
            "steps": 100_000,
            "epochs": 0,  # above 0: steps follow from the size of the data; for one stream
            "accumulate": 1,  # micro-batches per optimizer step
            "checkpoint_every": 1000,
            "keep_latest": 2,
            "keep_best": 1,
            "best_metric": "retrieval/mean_recall_of_streams",
            "profile_steps": (0, 0),  # (first, last): a jax.profiler trace of these steps; (0, 0): none
        }
    )


def _evaluate() -> ConfigDict:
    return ConfigDict(
        {
            "every": 5000,  # 0: only at the end
            "batch_size": 256,
            "split": "validation",  # while training
            "final_split": "test",  # at the end, and with --mode=evaluate
            "max_items": 0,  # of a gallery; 0: the whole split
            "equal_captions": False,  # a caption finds every item with the same caption; published recalls: its own
            "matching_weights": (1.0,),  # of log P(pair) in zero-shot scores; of several, the best on `split` counts
            "rerank": 128,  # candidates of a query re-scored with the fusion encoder; 0: contrastive only
            "all_pairs": False,  # re-score every pair, as the reference does
            "best": False,  # at the end: the best checkpoint by train.best_metric, not the last
        }
    )


def _log() -> ConfigDict:
    return ConfigDict({"every": 50, "tensorboard": True, "wandb_project": "", "console": True})


class ConfigError(ValueError):
    """A config that cannot work; the message lists every problem."""


def active_streams(config: ConfigDict) -> list[str]:
    """The streams with data sets and a share of the steps."""
    return [name for name in STREAMS if any(config.data[name].datasets) and config.data[name].share > 0]


def finalize(config: ConfigDict, vocab_size: int, answers: int = 0, examples: int = 0) -> ConfigDict:
    """The config with everything derived that follows from the rest.

    vocab_size: the tokenizer's. answers: of the data set, for visual questions. examples: of an epoch; 0: not known.
    """
    config = config.copy_and_resolve_references()
    if config.debug:
        _shrink(config)
    if config.model.text.vocab_size == 0:
        config.model.text.vocab_size = vocab_size
    if config.model.answers == 0:
        config.model.answers = answers
    if config.train.epochs and examples:
        batch_size = max(config.data[name].batch_size for name in active_streams(config))
        config.train.steps = -(-config.train.epochs * examples // batch_size)
    return config


def _shrink(config: ConfigDict) -> None:
    """A smoke run of the same code: a network of width 32, batches of 16, 20 steps."""
    sizes = {"width": 32, "heads": 2, "mlp_width": 64, "layers": 2}
    for part in (config.model.vision, config.model.text, config.model.fusion):
        part.update(sizes)
    config.model.projection_width = 16
    config.model.dtype = "float32"
    config.model.vision.image_size = 4 * config.model.vision.patch_size
    for stream in STREAMS:
        config.data[stream].update(image_size=config.model.vision.image_size, batch_size=16)
    config.objectives.group_size = 8
    config.retrieval.update(group_size=8, others=3, hard_negatives=min(config.retrieval.hard_negatives, 3))
    for objective in config.objectives.values():
        if isinstance(objective, ConfigDict):
            objective.update(start=0, ramp=0)
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.train.update(steps=20, epochs=0, checkpoint_every=10, accumulate=1)
    config.evaluate.update(every=10, batch_size=16, max_items=32, rerank=8)
    config.log.every = 5


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


# what may differ between a work directory's config and the one it is continued with
MAY_CHANGE = (
    "init",  # only step 0 looks at it
    "mesh",
    "distributed",
    "log",
    "evaluate",
    "data.dir",
    "data.threads",
    "data.prefetch",
    "train.checkpoint_every",
    "train.keep_latest",
    "train.keep_best",
    "train.best_metric",
    "train.profile_steps",
    "model.remat",
)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Options that a run cannot be continued with, as "name: old → new"."""
    found = []
    for key in sorted(set(old) | set(new)):
        name = f"{prefix}{key}"
        if name in MAY_CHANGE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        elif _plain(before) != _plain(after):
            found.append(f"{name}: {before} → {after}")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
