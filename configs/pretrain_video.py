"""The paper's video pre-training: `python -m scl_jax.main --config=configs/pretrain_video.py --workdir=runs/video`.

WebVid, 4 frames of 224 px a clip. Same network as for images: a clip is an image with more than one frame.
Evaluated on WebVid's validation split, as it has no test split; on MSR-VTT without training there: retrieval_msrvtt.py.
"""

from configs.common import VIDEO_SETS, paper


def get_config():
    config = paper()
    config.model.vision.image_size = 224
    config.data.images.share = 0.0
    config.data.videos.update(datasets=VIDEO_SETS, batch_size=4096, frames=4, image_size=224, share=1.0)
    config.evaluate.final_split = "validation"
    return config
