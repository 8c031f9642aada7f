"""The toy world on a laptop: `python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`.

Images and clips of coloured shapes, from random weights, in CPU minutes. Objectives enter one after the other. First
words are filled in: to do so, the encoders learn what colours and shapes look like. Then they learn to agree
(contrastive), in a few hundred steps; where that came first, 1,400 steps did not teach shapes, presumably since its
gradients are so noisy that Adam hardly sees what the words say. Then matching, and completion at last, which drowns
the rest where it comes at once.
"""

from configs.common import begin_later, toy_world


def get_config():
    config = toy_world()
    begin_later(config, ramp=100, contrastive=800, matching=1000, completion=1650)
    config.objectives.contrastive.weight = 0.25
    config.objectives.masked_language.mask_ratio = 0.4  # with fewer words to guess the others from, it has to look
    config.objectives.matching.hard_negatives = 0.9  # random scenes alone are too easy to tell apart
    config.objectives.group_size = 64  # among which the hard ones are found
    config.optimizer.decay = "cosine"
    config.train.update(steps=1800, checkpoint_every=450)
    return config
