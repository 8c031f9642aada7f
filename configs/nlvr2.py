"""Statements about two images, NLVR2: `python -m scl_jax.main --config=configs/nlvr2.py --workdir=runs/nlvr2`.

From the checkpoint of `configs/pretrain_image.py` in runs/image (`--config.init.checkpoint=…` for another one), at 288
px. The best checkpoint on dev is evaluated on test-P (`test1`).

On the toy world, after the quickstart: `--config=configs/nlvr2.py:toy --workdir=runs/nlvr2_toy`.
"""

from configs.common_tasks import downstream_images, finetuning, is_toy, toy


def get_config(variant: str = ""):
    if is_toy(variant):
        return toy("nlvr2", "nlvr2/accuracy", "toy_world/statements")
    config = finetuning("nlvr2", "nlvr2/accuracy", epochs=10, learning_rate=1e-5, head=10.0, fusion=10.0)
    downstream_images(config, "nlvr2/statements", batch_size=256, image_size=288)
    config.evaluate.update(split="dev", final_split="test1")
    return config
