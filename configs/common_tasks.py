"""What the configs of tasks share: the paper's settings, and the toy world; not a config itself."""

from ml_collections import ConfigDict

from configs.common import paper, toy_world


def finetuning(task: str, metric: str, *, epochs: int, learning_rate: float, head: float, fusion: float) -> ConfigDict:
    """A task at the paper's settings, from a pre-training run in runs/image; `head` and `fusion` multiply the rate.

    The checkpoint may be of another resolution, and is given with --config.init.checkpoint.
    """
    config = paper()
    config.task = task
    config.init.update(checkpoint="runs/image", vision="", text="")
    config.optimizer.update(learning_rate=learning_rate, multiplier_head=head, multiplier_fusion=fusion)
    config.train.update(epochs=epochs, best_metric=metric, checkpoint_every=500)
    config.evaluate.update(every=500, best=True, max_items=0)
    for stream in (config.data.images, config.data.videos):
        stream.update(share=0.0, evaluation_datasets=("",))  # a config switches one on; not what pre-training looks at
    return config


def downstream_images(config: ConfigDict, dataset: str, *, batch_size: int, image_size: int) -> None:
    """The images of a task: RandAugment and a slight crop, no flip."""
    config.model.vision.image_size = image_size
    config.data.images.update(datasets=(dataset,), batch_size=batch_size, image_size=image_size, share=1.0)
    config.data.images.update(crop_scale=(0.9, 1.0), flip="never", rand_augment=(2, 9))


def downstream_clips(config: ConfigDict, dataset: str) -> None:
    """The clips of a task: 4 frames of 224 px, augmented alike."""
    config.model.vision.image_size = 224
    config.data.videos.update(datasets=(dataset,), batch_size=256, image_size=224, frames=4, share=1.0)
    config.data.videos.update(crop_scale=(0.9, 1.0), flip="never", rand_augment=(2, 9))


def is_toy(variant: str) -> bool:
    """Whether `--config=….py:variant` asks for the toy world; ValueError for a variant that there is not."""
    if variant not in ("", "toy"):
        raise ValueError(f"this config has no variant {variant!r}; it has toy")
    return variant == "toy"


def toy(task: str, metric: str, dataset: str) -> ConfigDict:
    """The task on the toy world, from the quickstart's checkpoint and with its network, in CPU minutes.

    Rates are low for what is pre-trained and high for the new head: at the rate of pre-training, what was learned is
    lost (benchmarks/RESULTS.md).
    """
    config = toy_world()
    config.task = task
    config.init.checkpoint = "runs/quickstart"
    clips, retrieval = dataset == "toy_world/videos", task == "retrieval"
    config.data.images.update(datasets=(dataset,), share=0.0 if clips else 1.0, batch_size=32 if retrieval else 64)
    config.data.videos.update(datasets=(dataset,), share=1.0 if clips else 0.0, batch_size=16)
    config.retrieval.update(others=7, group_size=16)  # eight pairs of every item go through the fusion encoder
    config.optimizer.update(learning_rate=3e-4, multiplier_fusion=2.0, multiplier_head=10.0)
    steps = 300 if retrieval else 600
    config.train.update(steps=steps, best_metric=metric, checkpoint_every=steps // 3)
    config.evaluate.update(every=steps // 3, best=True)
    return config
