"""Flickr30k with Karpathy's split, as "flickr30k/captions".

    dataset_flickr30k.json                     Karpathy's split
    flickr30k-images/1000092795.jpg

Arrow files: f30k_caption_karpathy_{train,val,test}.arrow.
"""

from scl_jax.data.builders.karpathy import read_karpathy
from scl_jax.data.builders.raw import Counts, RawDataset, raw_builder
from scl_jax.data.builders.raw_files import Located, arrow_captions, value

IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "Flickr30K/images", "images")


def _locate(source, entry):
    return Located(source, tuple(f"{folder}/{value(entry, 'filename', str)}" for folder in IMAGE_FOLDERS))


_FILES = ("dataset_flickr30k.json", "karpathy/dataset_flickr30k.json")
DATASET = RawDataset(
    name="flickr30k",
    config="captions",
    read_tree=lambda source: read_karpathy(source, _FILES, _locate),
    read_arrow=arrow_captions(
        {
            "train": ("f30k_caption_karpathy_train.arrow",),
            "validation": ("f30k_caption_karpathy_val.arrow",),
            "test": ("f30k_caption_karpathy_test.arrow",),
        }
    ),
    published={
        "train": Counts(29_000, 145_000),
        "validation": Counts(1_014, 5_070),
        "test": Counts(1_000, 5_000),
    },
)
make_builder = raw_builder(DATASET)
