"""Visual entailment, SNLI-VE: `python -m scl_jax.main --config=configs/snli_ve.py --workdir=runs/snli_ve`.

From the checkpoint of `configs/pretrain_image.py` in runs/image (`--config.init.checkpoint=…` for another one), at 384
px, with METER's settings.

On the toy world, after the quickstart: `--config=configs/snli_ve.py:toy --workdir=runs/snli_ve_toy`.
"""

from configs.common_tasks import downstream_images, finetuning, is_toy, toy


def get_config(variant: str = ""):
    if is_toy(variant):
        return toy("entailment", "entailment/accuracy", "toy_world/entailment")
    config = finetuning("entailment", "entailment/accuracy", epochs=5, learning_rate=2e-6, head=10.0, fusion=10.0)
    downstream_images(config, "snli_ve/pairs", batch_size=64, image_size=384)
    return config
