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
# # To PyTorch and back
# The exported folder holds `model.safetensors` under the names of the authors' checkpoints.

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
needed = ("simplejpeg", "torch")  # simplejpeg is what Colab lacks; others it has in versions that are too old
if not all(map(importlib.util.find_spec, needed)):
    chips = {"gpu": "/dev/nvidia0", "tpu": "/dev/vfio/0"}  # JAX for them has to be of the library's version
    extras = ",".join(["torch", *(name for name, place in chips.items() if Path(place).exists())])
    library = f".[{extras}]"
    # %pip install --quiet -e "$library"
    importlib.invalidate_caches()
    if not all(map(importlib.util.find_spec, needed)):
        raise ImportError("the library could not be installed: pip says above why")
    print("installed")

# %% [markdown]
# A checkpoint to convert: the quickstart's (skipped where it is there already).

# %% language="bash"
# # images and clips of coloured shapes, a tokenizer of their captions, then about 15 minutes of training on 2 CPU cores
# set -e
# if [ ! -e runs/quickstart/results.json ]; then
#   python -m scl_jax.data.prepare --dataset=toy_world --out=data --train_tokenizer=data/tokenizer \
#     ${SCL_SCENES:+--train=$SCL_SCENES} > prepare.log
#   python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart $SCL_EXTRA
# fi

# %% language="bash"
# python -m scl_jax.convert runs/quickstart exported --overwrite

# %% [markdown]
# ## The same numbers in PyTorch

# %%
import numpy as np
import torch

import scl_jax
from scl_jax.convert.torch_model import SCL
from scl_jax.data.builders import open_source
from scl_jax.inference.media import image_pixels

record = open_source("toy_world/images", "test", "data")[0]
picture, caption = record["media"], record["captions"][0]
model = scl_jax.load("runs/quickstart")
twin = SCL.from_folder("exported").eval()

tokens = model.tokenizer.encode(caption, model.text_length)
token_ids, token_mask = (torch.tensor(tokens[name])[None] for name in ("token_ids", "token_mask"))
pixels = torch.tensor(image_pixels(picture, model.image_size))[None]
with torch.no_grad():
    text = twin.encode_text(token_ids.long(), token_mask)
    match = twin.matching_logits(twin.fuse(text, twin.encode_image(pixels))).softmax(-1)[0, 1].item()
print(f"probability of a match: {match:.6f} in PyTorch, {model.match(picture, caption):.6f} in JAX")
np.testing.assert_allclose(match, model.match(picture, caption), atol=1e-4)

# %% [markdown]
# ## And back
# The authors' `.ckpt`, `.pt` and `.safetensors` files are converted in the same way. Nothing in such a file is run.

# %% language="bash"
# python -m scl_jax.convert exported back --overwrite

# %%
back = scl_jax.load("back")
difference = np.abs(back.encode_texts(caption) - model.encode_texts(caption)).max()
print(f"features differ by {difference:.1e} after the round trip")
np.testing.assert_allclose(difference, 0.0, atol=1e-6)
