"""Every option of scl_jax with its default, its meaning and its checks.

A config file (`configs/*.py`) starts from `default_config()` and changes what differs. Overrides on the command line
(`--config.train.steps=10`) come after that; `finalize` then derives what follows from them and `check` reports
everything that cannot work, all at once, before anything is compiled.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """The method at full size (ViT-B/16, RoBERTa-base, six fusion layers) with the paper's settings."""
    config = ConfigDict()
    config.task = "pretrain"
    config.seed = 0
    config.debug = False  # shrink model, data and steps for a smoke run of the same code
    config.model = _model()
    config.objectives = _objectives()
    config.reference_behaviour = _reference_behaviour()
    config.data = _data()
    config.optimizer = _optimizer()
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all devices that the others leave
    config.train = _train()
    config.evaluate = _evaluate()
    config.log = _log()
    return config


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
                "vocab_size": 50265,
                "max_positions": 514,
            },
            "fusion": {"width": 768, "layers": 6, "heads": 12, "mlp_width": 3072},
            "projection_width": 512,  # of the contrastive space
            "dropout": 0.1,  # of the text and fusion layers; the vision encoder has none
            "attention_dropout": 0.1,  # of their attention weights
            "initial_temperature": 0.07,
            "dtype": "bfloat16",  # of activations; parameters, norms, softmax and losses stay float32
            "remat": "none",  # none | dots | full
        }
    )


def _objectives() -> ConfigDict:
    def objective(weight: float, **more) -> ConfigDict:
        # weight reached by a linear ramp of `ramp` steps that begins at step `start`; weight 0 switches it off
        return ConfigDict({"weight": weight, "start": 0, "ramp": 0, **more})

    return ConfigDict(
        {
            "contrastive": objective(0.5, temperature_min=0.01, temperature_max=1.0),
            "matching": objective(1.0),
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
        }
    )


def _stream(**changes) -> ConfigDict:
    stream = ConfigDict(
        {
            "datasets": ("",),  # "toy_world/images", "own_data/my_set"; empty: this stream is off
            "batch_size": 4096,  # of one optimizer step, over all devices
            "share": 1.0,  # of the steps that take this stream
            "frames": 1,
            "image_size": 288,
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
            "tokenizer": "roberta-base",  # a folder or a hub name
            "text_length": 50,  # tokens, <s> and </s> included
            "images": _stream(),
            "videos": _stream(batch_size=1024, frames=4, image_size=224, share=0.0),
            "threads": 8,
            "prefetch": 32,
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


def _train() -> ConfigDict:
    return ConfigDict(
        {
            "steps": 100_000,
            "accumulate": 1,  # micro-batches per optimizer step
            "checkpoint_every": 1000,
            "keep_latest": 2,
            "keep_best": 1,
            "best_metric": "retrieval/mean_recall",
            "profile_steps": (0, 0),  # (first, last): a jax.profiler trace of these steps; (0, 0): none
        }
    )


def _evaluate() -> ConfigDict:
    return ConfigDict(
        {
            "every": 5000,
            "batch_size": 256,
            "split": "validation",
            "final_split": "test",
            "max_items": 0,  # of a gallery; 0: the whole split
            "rerank": 128,  # candidates of a query re-scored with the matching head; 0: contrastive only
        }
    )


def _log() -> ConfigDict:
    return ConfigDict({"every": 50, "tensorboard": True, "wandb_project": "", "console": True})
