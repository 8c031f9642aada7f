"""The toy world on a laptop: `python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`.

Images and clips of coloured shapes, from random weights, in CPU minutes. Objectives enter one after the other: first
the encoders learn to agree (contrastive), then the fusion encoder learns to tell and to fill in (matching, masked
language), then completion begins: from random weights, completion at once drowns the rest.
"""

from scl_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    for part, layers in ((model.vision, 4), (model.text, 2), (model.fusion, 2)):
        part.update(width=64, layers=layers, heads=2, mlp_width=128)
    model.vision.update(patch_size=16, image_size=96, max_frames=4)
    model.text.update(vocab_size=0, max_positions=34)
    model.update(projection_width=64, dropout=0.0, attention_dropout=0.0, dtype="float32")

    data = config.data
    data.tokenizer = ""
    data.update(text_length=32, threads=2, prefetch=4)
    data.images.update(datasets=("toy_world/images",), batch_size=64, share=0.8, image_size=96)
    data.videos.update(datasets=("toy_world/videos",), batch_size=32, share=0.2, image_size=80, frames=4)
    for stream in (data.images, data.videos):
        stream.update(crop_scale=(1.0, 1.0), flip="never")  # positions and motion are what captions tell

    objectives = config.objectives
    for name in ("matching", "masked_language"):
        objectives[name].update(start=1800, ramp=100)
    objectives.matching.hard_negatives = 0.5  # random scenes alone are too easy to tell apart
    for name in ("global_vision", "global_text", "local_vision", "local_text"):
        objectives[name].update(start=2300, ramp=100)
        objectives[name].weight *= 0.1

    config.optimizer.update(learning_rate=2e-3, clip_norm=1.0, multiplier_fusion=1.0, multiplier_head=1.0)
    config.train.update(steps=2400, checkpoint_every=300)
    config.evaluate.update(every=0, batch_size=64, rerank=20)
    config.log.every = 25
    return config
