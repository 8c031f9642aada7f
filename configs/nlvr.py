"""People's sentences about boxes of shapes: `python -m scl_jax.main --config=configs/nlvr.py --workdir=runs/nlvr`.

The true statements of NLVR (Suhr et al., ACL 2017) as captions of its pictures, an example of a user's own data that
trains in CPU minutes. Prepare it first; statements about one scene stay in one split:

    python -m scl_jax.data.prepare --dataset=own_data/nlvr --captions=nlvr/dev/dev.json --format=nlvr \
        --media=nlvr/dev/images --out=data --train_tokenizer=data/nlvr_tokenizer --vocab_size=1000

The 400×100 px pictures become squares; the statements name colours, counts and places, which survives that.
"""

from scl_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    for part, layers in ((model.vision, 4), (model.text, 2), (model.fusion, 2)):
        part.update(width=64, layers=layers, heads=2, mlp_width=128)
    model.vision.update(patch_size=16, image_size=112, max_frames=1)
    model.text.update(vocab_size=0, max_positions=34)
    model.update(projection_width=64, dropout=0.0, attention_dropout=0.0, dtype="float32")

    data = config.data
    data.tokenizer = "data/nlvr_tokenizer"
    data.update(text_length=32, threads=2, prefetch=4)
    data.images.update(datasets=("own_data/nlvr",), batch_size=64, image_size=112)
    data.images.update(crop_scale=(1.0, 1.0), flip="never")  # captions tell places

    objectives = config.objectives
    for name in ("matching", "masked_language"):
        objectives[name].update(start=600, ramp=50)
    for name in ("global_vision", "global_text", "local_vision", "local_text"):
        objectives[name].update(start=850, ramp=50)
        objectives[name].weight *= 0.1

    config.optimizer.update(learning_rate=1e-3, clip_norm=1.0, multiplier_fusion=1.0, multiplier_head=1.0)
    config.train.update(steps=1000, checkpoint_every=250)
    config.evaluate.update(every=0, batch_size=64, rerank=20)
    config.log.every = 25
    return config
