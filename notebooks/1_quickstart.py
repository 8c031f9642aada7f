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
# # Quickstart: train on the toy world
# Small scenes of coloured shapes, still and moving, with captions. Validation and test show colour-shape pairs that
# training never shows. Nothing is downloaded but the library.

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
# ## Train
# Continues where it stopped when the runtime was lost, if the folder is still there.

# %% language="bash"
# # images and clips of coloured shapes, a tokenizer of their captions, then about 15 minutes of training on 2 CPU cores
# set -e
# if [ ! -e runs/quickstart/results.json ]; then
#   python -m scl_jax.data.prepare --dataset=toy_world --out=data --train_tokenizer=data/tokenizer \
#     ${SCL_SCENES:+--train=$SCL_SCENES} > prepare.log
#   python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart $SCL_EXTRA
# fi

# %% [markdown]
# ## What it learned
# Retrieval both ways on held-out scenes, matching and masked words.

# %%
import json

results = json.loads(Path("runs/quickstart/results.json").read_text())
for name, value in results.items():
    if name.endswith(("recall@1", "accuracy")):
        print(f"{name:<45}{value:.3f}")

# %%
from IPython.display import Image, display

for picture in ("loss_curves.png", "retrieval_images.png"):
    display(Image(f"runs/quickstart/{picture}"))
