"""MSRVTT retrieval, 1k-A: `python -m scl_jax.main --config=configs/retrieval_msrvtt.py --workdir=runs/msrvtt`.

From the checkpoint of `configs/pretrain_video.py` in runs/video (`--config.init.checkpoint=…` for another one), 4
frames of 224 px. The split has no validation part, so the last checkpoint is evaluated. Zero-shot, with the matching
head of the pre-training checkpoint:

    python -m scl_jax.main --config=configs/retrieval_msrvtt.py --workdir=runs/msrvtt_zero_shot --mode=evaluate \
        --config.task=pretrain

On the toy world, after the quickstart: `--config=configs/retrieval_msrvtt.py:toy --workdir=runs/msrvtt_toy`.
"""

from configs.common_tasks import downstream_clips, finetuning, is_toy, toy


def get_config(variant: str = ""):
    if is_toy(variant):
        return toy("retrieval", "retrieval/mean_recall_of_streams", "toy_world/videos")
    config = finetuning(
        "retrieval", "retrieval/mean_recall_of_streams", epochs=10, learning_rate=5e-6, head=5.0, fusion=5.0
    )
    config.init.checkpoint = "runs/video"
    downstream_clips(config, "msrvtt/captions")
    config.optimizer.warmup = 0.05
    config.evaluate.update(every=0, best=False)
    return config
