"""Every option of scl_jax with its default and its meaning.

A config file (`configs/*.py`) starts from `default_config()` and changes what differs. Overrides on the command line
(`--config.train.steps=10`) come after that; `finalize` then derives what follows from them, and
`config_check.check` reports everything that cannot work.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scl_jax.task_config import retrieval_defaults

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
    # where compiled programs are kept for the next run; $JAX_COMPILATION_CACHE_DIR goes first; empty: nowhere
    config.compilation_cache = "~/.cache/scl_jax/xla"
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
            "initializer_range": 0.02,  # deviation of random weights in text, fusion and heads: BERT's, for its width
            "dtype": "bfloat16",  # of activations; parameters, norms, softmax and losses stay float32
            # what a step computes again instead of keeping it: none | dots (all but matrix products) | full (all of a
            # layer); auto: the first of these that fits the device, for which they are compiled; on CPUs none
            "remat": "auto",
            # auto | xla | by_head (for CPUs) | mosaic (our kernel for TPUs) | fused (ours for GPUs) | cudnn; the last
            # three are in bfloat16, and cuDNN's kernels know no dropout
            "attention": "auto",
            # layers that a turn of the loop over layers holds: faster steps, longer compilation; 0: on GPUs and TPUs
            # all, unless model.remat is full, else one
            "unroll": 0,
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
            # (least, most) of the area in training crops, whose ratio is 3/4 to 4/3, so that wider pictures always
            # lose their sides. (1.0, 1.0): the whole picture
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
            "bad_records": "fail",  # fail | skip (look at all records first, leave out and list what cannot be used)
            "max_skipped_share": 0.01,  # of the records of a split; more are an error
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
            "max_nonfinite_in_row": 10,  # updates skipped in a row, loss or gradient not finite, that end the run
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
            "matching_weights": (1.0,),  # of log P(pair) in zero-shot scores; of several, the clearly best on `split`
            "rerank": 128,  # candidates of a query re-scored with the fusion encoder; 0: contrastive only
            "all_pairs": False,  # re-score every pair, as the reference does
            "best": False,  # at the end: the best checkpoint by train.best_metric, not the last
        }
    )


def _log() -> ConfigDict:
    return ConfigDict({"every": 50, "tensorboard": True, "wandb_project": "", "console": True})


class ConfigError(ValueError):
    """A config that cannot work; the message lists every problem."""


def config_of_run(workdir: Path) -> ConfigDict:
    """The config that a work directory was begun with; options younger than the run have their default.

    Raises:
        FileNotFoundError: it holds none.
        ConfigError: its config.json is no JSON, or holds values of other types.
    """
    file = workdir / "config.json"
    config = default_config().unlock()
    try:
        config.update(json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing: give the work directory of a run") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error})") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: not the config of a run ({error})") from error
    return config.lock()


def active_streams(config: ConfigDict) -> list[str]:
    """The streams with data sets and a share of the steps."""
    return [name for name in STREAMS if any(config.data[name].datasets) and config.data[name].share > 0]


def finalize(config: ConfigDict, vocab_size: int, answers: int = 0, examples: int = 0, devices: int = 1) -> ConfigDict:
    """The config with everything derived that follows from the rest.

    vocab_size: the tokenizer's. answers: of the data set, for visual questions. examples: of an epoch; 0: not known.
    devices: that the run will use; a smoke run is as large as they need.
    """
    config = config.copy_and_resolve_references()
    if config.debug:
        _shrink(config, devices)
    if config.model.text.vocab_size == 0:
        config.model.text.vocab_size = vocab_size
    if config.model.answers == 0:
        config.model.answers = answers
    if config.train.epochs and examples:
        batch_size = max(config.data[name].batch_size for name in active_streams(config))
        config.train.steps = -(-config.train.epochs * examples // batch_size)
    return config


def _shrink(config: ConfigDict, devices: int) -> None:
    """A smoke run of the same code: a network of width 32, batches of 16 (more where there are more devices), 20 steps.

    No published encoder has this size; a checkpoint may, as that of another smoke run. Of the evaluation, what is
    smaller or off stays so.
    """
    sizes = {"width": 32, "heads": 2, "mlp_width": 64, "layers": 2}
    for part in (config.model.vision, config.model.text, config.model.fusion):
        part.update(sizes)
    config.init.update(vision="", text="")
    config.model.projection_width = 16
    config.model.dtype = "float32"
    config.model.vision.image_size = 4 * config.model.vision.patch_size
    pieces = math.lcm(8, devices)  # whole groups, and as many samples on each device
    batch_size = -(-16 // pieces) * pieces
    for stream in STREAMS:
        config.data[stream].update(image_size=config.model.vision.image_size, batch_size=batch_size)
    config.objectives.group_size = 8
    config.retrieval.update(group_size=8, others=3, hard_negatives=min(config.retrieval.hard_negatives, 3))
    for objective in config.objectives.values():
        if isinstance(objective, ConfigDict):
            objective.update(start=0, ramp=0)
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.train.update(steps=20, epochs=0, checkpoint_every=10, accumulate=1)
    e = config.evaluate
    fits = e.batch_size < batch_size and e.batch_size % devices == 0
    e.update(every=min(e.every, 10), batch_size=e.batch_size if fits else batch_size, rerank=min(e.rerank, 8))
    e.max_items = min(e.max_items or 32, 32)
    config.log.every = 5


# what may differ between a work directory's config and the one it is continued with
MAY_CHANGE = (
    "init",  # only step 0 looks at it
    "mesh",
    "distributed",
    "compilation_cache",
    "log",
    "evaluate",
    "data.dir",
    "data.threads",
    "data.prefetch",
    "data.bad_records",  # another order of examples from there on, which the log says
    "data.max_skipped_share",
    "train.checkpoint_every",
    "train.keep_latest",
    "train.keep_best",
    "train.best_metric",
    "train.max_nonfinite_in_row",
    "train.profile_steps",
    "model.remat",
    "model.initializer_range",  # only step 0 looks at it
    "model.attention",
    "model.unroll",
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
