"""Images and videos in turn: `python -m scl_jax.main --config=configs/pretrain_joint.py --workdir=runs/joint`.

Whole batches alternate, each stream at its own size: 4096 images of 288 px, 1024 clips of 4 frames of 224 px. The
position table is that of 288 px; clips read it resized.
Evaluated on the validation splits of COCO and WebVid, as WebVid has no test split.
"""

from configs.common import IMAGE_SETS, VIDEO_SETS, paper


def get_config():
    config = paper()
    config.model.vision.image_size = 288
    config.data.images.update(datasets=IMAGE_SETS, batch_size=4096, image_size=288, share=0.5)
    config.data.videos.update(datasets=VIDEO_SETS, batch_size=1024, frames=4, image_size=224, share=0.5)
    config.evaluate.final_split = "validation"
    return config
