"""Visual Genome's region descriptions as captions of the whole image, as "visual_genome/captions".

    region_descriptions.json
    VG_100K/2318538.jpg
    VG_100K_2/1.jpg

One split, `train`. Arrow files: vg*.arrow.
"""

from pathlib import Path
from typing import Any

from scl_jax.data.builders.caption_files import Place
from scl_jax.data.builders.raw import Counts, RawDataset, RawItem, RawSplits, RawText, raw_builder
from scl_jax.data.builders.raw_files import Located, arrow_captions, each, numbered, read_json, required, value

_FOLDERS = ("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2")


def read_tree(source: Path) -> RawSplits:
    """An entry of the JSON list is an image with its regions."""
    file = required(source, "region_descriptions.json", "annotations/region_descriptions.json")

    def make(place: Place, entry: dict[str, Any]) -> RawItem:
        name = str(value(entry, "id"))
        regions = value(entry, "regions", list)
        image = Located(source, tuple(f"{folder}/{name}.jpg" for folder in _FOLDERS))
        return RawItem(place, name, (image,), tuple(RawText(value(region, "phrase", object)) for region in regions))

    return RawSplits({"train": each(numbered(file, read_json(file)), make)})


DATASET = RawDataset(
    name="visual_genome",
    config="captions",
    read_tree=read_tree,
    read_arrow=arrow_captions({"train": ("vg*.arrow",)}),
    published={"train": Counts(108_077, None)},
)
make_builder = raw_builder(DATASET)
