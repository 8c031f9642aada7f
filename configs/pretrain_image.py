"""The paper's image pre-training: `python -m scl_jax.main --config=configs/pretrain_image.py --workdir=runs/image`.

COCO, Visual Genome, SBU and Conceptual Captions at 288 px, 4096 pairs a step, from CLIP and RoBERTa (`init.vision` and
`init.text`: hub names or folders). Where a step does not fit the memory,
`--config.train.accumulate=8` takes it in eight parts: same negatives, same gradient.
"""

from configs.common import IMAGE_SETS, paper


def get_config():
    config = paper()
    config.model.vision.image_size = 288
    config.data.images.update(datasets=IMAGE_SETS, batch_size=4096, image_size=288)
    return config
