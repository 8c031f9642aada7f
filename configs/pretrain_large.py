"""ViT-L/14 and RoBERTa-large: `python -m scl_jax.main --config=configs/pretrain_large.py --workdir=runs/large`.

The image pre-training of the paper with a larger network; only sizes differ. 336 px, because patches of 14 divide it
(and 224, but not 288). Needs at least 8 devices: parameters and optimizer state are split over "fsdp".
"""

from configs.common import IMAGE_SETS, paper


def get_config():
    config = paper()
    large = {"width": 1024, "heads": 16, "mlp_width": 4096}
    config.model.vision.update(**large, layers=23, patch_size=14, image_size=336)  # 24 blocks, the last one dropped
    config.model.text.update(**large, layers=24)
    config.model.fusion.update(**large)
    config.init.update(vision="openai/clip-vit-large-patch14-336", text="roberta-large")
    config.mesh.fsdp = 8
    config.data.images.update(datasets=IMAGE_SETS, batch_size=4096, image_size=336)
    return config
