"""The toy world on a laptop: `python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`.

Images and clips of coloured shapes, from random weights, in CPU minutes. Objectives enter one after the other: first
the encoders learn to agree (contrastive), then the fusion encoder learns to tell and to fill in (matching, masked
language), then completion begins: from random weights, completion at once drowns the rest.
"""

from configs.common import begin_later, laptop


def get_config():
    config = laptop(image_size=96, max_frames=4)
    data = config.data
    data.tokenizer = ""  # the one that launch/quickstart.sh trains beside the shards
    data.images.update(datasets=("toy_world/images",), batch_size=64, share=0.8, image_size=96)
    data.videos.update(datasets=("toy_world/videos",), batch_size=32, share=0.2, image_size=80, frames=4)

    begin_later(config, fusion=1800, completion=2300, ramp=100)
    config.objectives.matching.hard_negatives = 0.5  # random scenes alone are too easy to tell apart
    config.train.update(steps=2400, checkpoint_every=300)
    return config
