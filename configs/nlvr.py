"""People's sentences about boxes of shapes: `python -m scl_jax.main --config=configs/nlvr.py --workdir=runs/nlvr`.

The true statements of NLVR (Suhr et al., ACL 2017) as captions of its pictures, an example of a user's own data that
trains in CPU minutes. Prepare it first; statements about one scene stay in one split:

    python -m scl_jax.data.prepare --dataset=own_data/nlvr --captions=nlvr/dev/dev.json --format=nlvr \
        --media=nlvr/dev/images --out=data --test=0.15 --train_tokenizer=data/nlvr_tokenizer --vocab_size=1000

The 400×100 px pictures become squares; the statements name colours, counts and places, which survives that.
"""

from configs.common import begin_later, laptop


def get_config():
    config = laptop(image_size=112)
    data = config.data
    data.tokenizer = "data/nlvr_tokenizer"
    data.images.update(datasets=("own_data/nlvr",), batch_size=64, image_size=112)

    begin_later(config, ramp=50, completion=700, matching=100, masked_language=100)
    config.optimizer.update(learning_rate=1e-3, decay="cosine")
    config.train.update(steps=800, checkpoint_every=200)
    config.evaluate.equal_captions = True  # six pictures share a statement
    return config
