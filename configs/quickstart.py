"""The toy world on a laptop: `python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`.

Images and clips of coloured shapes, from random weights, in CPU minutes. Objectives enter one after the other: first
the encoders learn to agree (contrastive), then the fusion encoder learns to tell and to fill in (matching, masked
language), then completion begins: from random weights, completion at once drowns the rest.
"""

from configs.common import begin_later, toy_world


def get_config():
    config = toy_world()
    begin_later(config, fusion=200, completion=1150, ramp=100)
    config.objectives.masked_language.mask_ratio = 0.4  # with fewer words to guess the others from, it has to look
    config.objectives.matching.hard_negatives = 0.9  # random scenes alone are too easy to tell apart
    config.objectives.group_size = 64  # among which the hard ones are found
    config.optimizer.decay = "cosine"
    config.train.update(steps=1400, checkpoint_every=350)
    return config
