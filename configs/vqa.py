"""Visual question answering, VQA v2: `python -m scl_jax.main --config=configs/vqa.py --workdir=runs/vqa`.

From the checkpoint of `configs/pretrain_image.py` in runs/image (`--config.init.checkpoint=…` for another one), at 384
px. The answers to test-dev are left in runs/vqa/predictions/ for EvalAI; those to test-std:

    python -m scl_jax.main --config=configs/vqa.py --workdir=runs/vqa --mode=evaluate --config.evaluate.final_split=test

On the toy world, after the quickstart: `--config=configs/vqa.py:toy --workdir=runs/vqa_toy`.
"""

from configs.common_tasks import downstream_images, finetuning, is_toy, toy


def get_config(variant: str = ""):
    if is_toy(variant):
        return toy("vqa", "vqa/score", "toy_world/questions")
    config = finetuning("vqa", "vqa/score", epochs=10, learning_rate=5e-6, head=50.0, fusion=10.0)
    downstream_images(config, "vqav2/questions", batch_size=512, image_size=384)
    config.model.answers = 3129
    config.evaluate.final_split = "test_dev"
    return config
