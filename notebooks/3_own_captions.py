# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train further on your own captions
# A file with a caption for each picture, three commands, and a model that knows your pictures.

# %%
# The library: the folder above this notebook or, as on Colab, a copy of REPOSITORY. CPU, GPU and TPU runtimes work.
import importlib.util
import os
from pathlib import Path

REPOSITORY = os.environ.get("SCL_REPOSITORY", "")  # the git address of scl_jax
places = (Path.cwd(), Path.cwd().parent, Path.cwd() / "scl_jax_copy")
root = next((place for place in places if (place / "scl_jax" / "__init__.py").exists()), None)
if root is None:
    if not REPOSITORY:
        raise FileNotFoundError("write the git address of scl_jax into REPOSITORY")
    # !git clone --quiet "$REPOSITORY" scl_jax_copy
    root = Path.cwd() / "scl_jax_copy"
os.chdir(root)
needed = ("simplejpeg",)  # simplejpeg is what Colab lacks; others it has in versions that are too old
if not all(map(importlib.util.find_spec, needed)):
    chips = {"gpu": "/dev/nvidia0", "tpu": "/dev/vfio/0"}  # JAX for them has to be of the library's version
    extras = ",".join(name for name, place in chips.items() if Path(place).exists())
    library = f".[{extras}]" if extras else "."
    # %pip install --quiet -e "$library"
    importlib.invalidate_caches()
    if not all(map(importlib.util.find_spec, needed)):
        raise ImportError("the library could not be installed: pip says above why")
    print("installed")

# %% [markdown]
# A checkpoint to start from: the quickstart's (skipped where it is there already).

# %% language="bash"
# # images and clips of coloured shapes, a tokenizer of their captions, then about 15 minutes of training on 2 CPU cores
# set -e
# if [ ! -e runs/quickstart/results.json ]; then
#   python -m scl_jax.data.prepare --dataset=toy_world --out=data --train_tokenizer=data/tokenizer \
#     ${SCL_SCENES:+--train=$SCL_SCENES} > prepare.log
#   python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart $SCL_EXTRA
# fi

# %% [markdown]
# ## Your pictures and captions
# One JSON object a line: `{"image": "a.jpg", "caption": "what it shows"}`. This cell makes an example out of scenes
# that the checkpoint has not seen; put your own files in their place.

# %%
import json

from scl_jax.data.builders import toy_world

media = Path("my_pictures")
media.mkdir(exist_ok=True)
with open("my_captions.jsonl", "w") as file:
    for record in toy_world.records("images", "validation", 80, seed=7):
        (media / f"{record['id']}.jpg").write_bytes(record["media"])
        file.write(json.dumps({"image": f"{record['id']}.jpg", "captions": record["captions"]}) + "\n")

# %% [markdown]
# ## Check them and write shards
# What cannot be read is reported with file, line and reason. The tokenizer stays that of the checkpoint.

# %% language="bash"
# python -m scl_jax.data.prepare --dataset=own_data/mine --captions=my_captions.jsonl --media=my_pictures --out=data \
#   --overwrite --validation=0.2 --test=0.2

# %% [markdown]
# ## Train from the checkpoint
# The network is the checkpoint's, so its config is the quickstart's, with other data, and all objectives from step 0.
# With a checkpoint of the paper's size take `configs/pretrain_image.py` in the same way.

# %% language="bash"
# set -e
# rm -rf runs/mine
# python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/mine \
#   --config.init.checkpoint=runs/quickstart \
#   --config.data.images.datasets="('own_data/mine',)" --config.data.videos.share=0.0 --config.data.images.share=1.0 \
#   --config.objectives.matching.start=0 --config.objectives.masked_language.start=0 \
#   --config.optimizer.learning_rate=2e-4 --config.data.images.batch_size=16 --config.evaluate.batch_size=16 \
#   --config.evaluate.rerank=4 --config.train.steps=40 $SCL_EXTRA

# %%
results = json.loads(Path("runs/mine/results.json").read_text())
print({name: round(value, 3) for name, value in results.items() if name.endswith("recall@1")})

# %%
import scl_jax

model = scl_jax.load("runs/mine")
picture = sorted(media.glob("*.jpg"))[0]
print(model.rank(picture, ["a red star", "a blue ring", "two big circles"], k=1, query_is_text=False))
