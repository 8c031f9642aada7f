"""What configs share: the paper's settings and a laptop's; not a config itself."""

from ml_collections import ConfigDict

from scl_jax.config import default_config

# the paper's sets: about 4 million images, and WebVid
IMAGE_SETS = ("coco/captions", "visual_genome/captions", "sbu/captions", "conceptual_captions/captions")
VIDEO_SETS = ("webvid/captions",)
IMAGE_EVALUATION = ("coco/captions",)  # the one with a validation and a test split


def paper() -> ConfigDict:
    """ViT-B/16, RoBERTa-base and six fusion layers with the paper's optimizer, for many devices; no data sets yet."""
    config = default_config()
    config.init.update(vision="openai/clip-vit-base-patch16", text="roberta-base")  # hub names, or folders
    config.optimizer.update(learning_rate=2e-5, weight_decay=0.01, warmup=0.1, decay="linear")
    config.train.steps = 100_000
    config.data.prefetch = 2  # batches; one of 4096 images holds 1 GB, divided by the processes
    config.data.images.evaluation_datasets = IMAGE_EVALUATION
    config.evaluate.max_items = 1000  # a gallery while training and at the end; 0: the whole split
    return config


def laptop(image_size: int, max_frames: int = 1) -> ConfigDict:
    """A network of width 64 that learns from random weights in CPU minutes, on pictures whose places matter."""
    config = default_config()
    model = config.model
    for part, layers in ((model.vision, 4), (model.text, 2), (model.fusion, 2)):
        part.update(width=64, layers=layers, heads=2, mlp_width=128)
    model.vision.update(patch_size=16, image_size=image_size, max_frames=max_frames)
    model.text.update(vocab_size=0, max_positions=34)
    model.update(projection_width=64, dropout=0.0, attention_dropout=0.0, dtype="float32", remat="none")
    model.initializer_range = 0.08  # as 0.02 is to width 768: at 0.02 it learns five times more slowly

    data = config.data
    data.update(text_length=32, threads=1, prefetch=4)  # small pictures: a second thread waits for Python's lock
    for stream in (data.images, data.videos):
        stream.update(crop_scale=(1.0, 1.0), flip="never")  # captions tell places and directions

    config.optimizer.update(learning_rate=2e-3, clip_norm=1.0, multiplier_fusion=1.0, multiplier_head=1.0)
    config.evaluate.update(every=0, batch_size=64, rerank=20, matching_weights=(0.0, 0.25, 0.5, 1.0, 2.0))
    config.log.every = 25
    return config


def toy_world() -> ConfigDict:
    """The laptop's network on scenes and clips of coloured shapes."""
    config = laptop(image_size=96, max_frames=4)
    config.model.fusion.layers = 1  # the layer whose attention is looked at has to find the objects itself
    data = config.data
    data.tokenizer = ""  # the one that launch/quickstart.sh trains beside the shards
    data.images.update(datasets=("toy_world/images",), batch_size=64, share=0.8, image_size=96)
    data.videos.update(datasets=("toy_world/videos",), batch_size=32, share=0.2, image_size=80, frames=4)
    return config


def begin_later(config: ConfigDict, ramp: int, completion: int, **starts: int) -> None:
    """Objectives enter one after the other, as random weights need it: `starts` at their steps, completion last.

    Completion at full weight from the first step drowns the rest; it begins with a tenth of its weight.
    """
    for name, start in starts.items():
        config.objectives[name].update(start=start, ramp=ramp)
    for name in ("global_vision", "global_text", "local_vision", "local_text"):
        config.objectives[name].update(start=completion, ramp=ramp)
        config.objectives[name].weight *= 0.1
