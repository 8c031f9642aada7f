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
# # A trained model on your own pictures
# Features, matching, ranking, masked words and attention maps. `CHECKPOINT` may be a run of this library, a converted
# or exported folder, one of the authors' files, or a name on the Hugging Face hub.

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
# Without a checkpoint of your own, train the quickstart's (skipped where it is there already).

# %% language="bash"
# # images and clips of coloured shapes, a tokenizer of their captions, then about 15 minutes of training on 2 CPU cores
# set -e
# if [ ! -e runs/quickstart/results.json ]; then
#   python -m scl_jax.data.prepare --dataset=toy_world --out=data --train_tokenizer=data/tokenizer \
#     ${SCL_SCENES:+--train=$SCL_SCENES} > prepare.log
#   python -m scl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart $SCL_EXTRA
# fi

# %%
import scl_jax

CHECKPOINT = "runs/quickstart"
model = scl_jax.load(CHECKPOINT)
print("heads:", ", ".join(model.heads))

# %% [markdown]
# ## Pictures
# Paths, PIL images, uint8 arrays, or lists of them. Here: three held-out scenes of the toy world. Put your own files
# into `pictures`, and say in `captions` what is in them.

# %%
from IPython.display import Image, display

from scl_jax.data.builders import open_source

records = [open_source("toy_world/images", "test", "data")[index] for index in range(3)]
pictures = [record["media"] for record in records]
captions = [record["captions"][0] for record in records]
for picture, caption in zip(pictures, captions, strict=True):
    display(Image(picture))
    print(caption)

# %% [markdown]
# ## Which text belongs to which picture?
# Rows are pictures, columns texts: cosines of unit vectors, then the matching head's probability of the true pairs.

# %%
print(model.similarity(pictures, captions).round(2))
print(model.match(pictures, captions).round(3))

# %%
for answer in model.rank(captions[0], pictures, k=3):
    print(answer)

# %% [markdown]
# ## Masked words

# %%
words = captions[0].split()
print(words[1], "is hidden:", model.fill_mask(" ".join([words[0], "<mask>", *words[2:]]), pictures[0], k=3))

# %% [markdown]
# ## Where does each word look?
# Cross-attention of the last text fusion layer, the maximum over heads.

# %%
from scl_jax.plots_attention import attention_sheet

display(Image(attention_sheet(model.attention_map(pictures[0], captions[0]), "attention.png").read_bytes()))

# %% [markdown]
# A clip gets a strip of frames.

# %%
clip = open_source("toy_world/videos", "test", "data")[0]
display(Image(attention_sheet(model.attention_map(clip["media"], clip["captions"][0]), "clip.png").read_bytes()))

# %% [markdown]
# ## Search a folder

# %% language="bash"
# set -e
# mkdir -p pictures
# python - <<'PYTHON'
# from pathlib import Path
# from scl_jax.data.builders import open_source
# for record in (open_source("toy_world/images", "test", "data")[index] for index in range(8)):
#     Path("pictures", record["id"] + ".jpg").write_bytes(record["media"])
# PYTHON
# python -m scl_jax.search build pictures runs/index --checkpoint=runs/quickstart --overwrite
# python -m scl_jax.search query runs/index --text "a red star" -k 3
