"""Your own captions, a template: `python -m scl_jax.main --config=configs/own_data.py --workdir=runs/own_data`.

First prepare them, and a tokenizer that knows their words:

    python -m scl_jax.data.prepare --dataset=own_data/my_set --captions=captions.jsonl --media=media \
        --out=data --train_tokenizer=data/my_set_tokenizer

A small network for one GPU and a few 10,000 pairs, from random weights. Copy this file and change what
differs: sizes, batch, steps. Without a GPU, configs/nlvr.py shows what is small enough.
"""

from configs.common import begin_later
from scl_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    for part, layers in ((model.vision, 6), (model.text, 4), (model.fusion, 3)):
        part.update(width=384, layers=layers, heads=6, mlp_width=1536)
    model.vision.image_size = 224
    model.text.vocab_size = 0  # the tokenizer's
    model.projection_width = 256
    model.initializer_range = 0.03  # as 0.02 is to width 768

    data = config.data
    data.tokenizer = "data/my_set_tokenizer"
    data.images.update(datasets=("own_data/my_set",), batch_size=256, image_size=224)
    # videos instead, or besides with share=0.5 on both:
    # data.videos.update(datasets=("own_data/my_clips",), batch_size=64, frames=4, image_size=224, share=1.0)

    # From random weights, objectives enter one after the other; completion last, or it drowns the rest.
    begin_later(config, ramp=500, completion=14_000, matching=8_000, masked_language=8_000)
    config.train.update(steps=20_000, checkpoint_every=1000)
    config.optimizer.update(learning_rate=5e-4, clip_norm=1.0, multiplier_fusion=1.0, multiplier_head=1.0)
    config.evaluate.update(every=2000, max_items=1000)
    return config
