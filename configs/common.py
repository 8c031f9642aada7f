"""What the paper's pre-training configs share; not a config itself."""

from ml_collections import ConfigDict

from scl_jax.config import default_config

# the paper's sets: about 4 million images, and WebVid
IMAGE_SETS = ("coco/captions", "visual_genome/captions", "sbu/captions", "conceptual_captions/captions")
VIDEO_SETS = ("webvid/captions",)
# those with a validation and a test split to evaluate on
IMAGE_EVALUATION, VIDEO_EVALUATION = ("coco/captions",), ("msrvtt/captions",)


def paper() -> ConfigDict:
    """ViT-B/16, RoBERTa-base and six fusion layers with the paper's optimizer, for many devices; no data sets yet."""
    config = default_config()
    config.init.update(vision="openai/clip-vit-base-patch16", text="roberta-base")  # hub names, or folders
    config.model.remat = "full"  # at 16 samples a chip, activations alone would be larger than a small chip's memory
    config.optimizer.update(learning_rate=2e-5, weight_decay=0.01, warmup=0.1, decay="linear")
    config.train.steps = 100_000
    config.data.prefetch = 2  # batches; one of 4096 images holds 1 GB, divided by the processes
    config.data.images.evaluation_datasets = IMAGE_EVALUATION
    config.data.videos.evaluation_datasets = VIDEO_EVALUATION
    config.evaluate.max_items = 1000  # a gallery while training and at the end; 0: the whole split
    return config
