"""COCO with Karpathy's split, as "coco/captions".

    dataset_coco.json                          Karpathy's split
    train2014/COCO_train2014_000000000009.jpg
    val2014/COCO_val2014_000000000042.jpg

`train` is Karpathy's train and restval. Arrow files: coco_caption_karpathy_{train,restval,val,test}.arrow.
"""

from scl_jax.data.builders.karpathy import read_karpathy
from scl_jax.data.builders.raw import Counts, RawDataset, raw_builder
from scl_jax.data.builders.raw_files import Located, arrow_captions, value


def _locate(source, entry):
    name = value(entry, "filename", str)
    return Located(source, (f"{value(entry, 'filepath', str)}/{name}", f"images/{entry['filepath']}/{name}"))


DATASET = RawDataset(
    name="coco",
    config="captions",
    read_tree=lambda source: read_karpathy(source, ("dataset_coco.json", "karpathy/dataset_coco.json"), _locate),
    read_arrow=arrow_captions(
        {
            "train": ("coco_caption_karpathy_train.arrow", "coco_caption_karpathy_restval.arrow"),
            "validation": ("coco_caption_karpathy_val.arrow",),
            "test": ("coco_caption_karpathy_test.arrow",),
        }
    ),
    published={
        "train": Counts(113_287, 566_747),
        "validation": Counts(5_000, 25_010),
        "test": Counts(5_000, 25_010),
    },
)
make_builder = raw_builder(DATASET)
