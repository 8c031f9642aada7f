"""COCO retrieval: `python -m scl_jax.main --config=configs/retrieval_coco.py --workdir=runs/coco`.

From the checkpoint of `configs/pretrain_image.py` in runs/image (`--config.init.checkpoint=…` for another one), at 384
px. The contrastive similarity picks 256 candidates, which the rank head re-scores; `--config.evaluate.all_pairs=true`
re-scores every pair. Zero-shot, with the matching head of the pre-training checkpoint:

    python -m scl_jax.main --config=configs/retrieval_coco.py --workdir=runs/coco_zero_shot --mode=evaluate \
        --config.task=pretrain

On the toy world, after the quickstart: `--config=configs/retrieval_coco.py:toy --workdir=runs/coco_toy`.
"""

from configs.common_tasks import downstream_images, finetuning, is_toy, toy


def get_config(variant: str = ""):
    if is_toy(variant):
        return toy("retrieval", "retrieval/mean_recall_of_streams", "toy_world/images")
    config = finetuning(
        "retrieval", "retrieval/mean_recall_of_streams", epochs=10, learning_rate=5e-6, head=5.0, fusion=5.0
    )
    downstream_images(config, "coco/captions", batch_size=512, image_size=384)
    config.evaluate.rerank = 256
    return config
