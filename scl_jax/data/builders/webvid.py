"""WebVid-2M, as "webvid/captions".

    results_2M_train.csv                       videoid, contentUrl, duration, page_dir, name
    results_2M_val.csv
    videos/<page_dir>/<videoid>.mp4            what could be downloaded

Arrow files of the same columns as ViLT's, with the encoded clip in `video`: webvid_{train,val}*.arrow.
"""

from pathlib import Path

from scl_jax.data.builders.caption_files import Place
from scl_jax.data.builders.raw import Counts, Entries, RawDataset, RawItem, RawSplits, RawText, raw_builder
from scl_jax.data.builders.raw_files import Located, arrow_captions, each, required, table, value

_FILES = {"train": "results_2M_train.csv", "validation": "results_2M_val.csv"}


def read_tree(source: Path) -> RawSplits:
    """A row of the table is a clip with its title."""

    folder = required(source, "videos")

    def make(place: Place, entry: dict[str, str]) -> RawItem:
        name = value(entry, "videoid", str)
        clip = Located(folder, (f"{value(entry, 'page_dir', str)}/{name}.mp4", f"{name}.mp4"))
        return RawItem(place, name, (clip,), (RawText(value(entry, "name", str)),))

    def entries(name: str) -> Entries:
        yield from each(table(required(source, name), ","), make)

    return RawSplits({split: entries(name) for split, name in _FILES.items()})


DATASET = RawDataset(
    name="webvid",
    config="captions",
    read_tree=read_tree,
    read_arrow=arrow_captions({"train": ("webvid_train*.arrow",), "validation": ("webvid_val*.arrow",)}, "video"),
    published={"train": Counts(None, None), "validation": Counts(5_000, 5_000)},
    medium="video",
)
make_builder = raw_builder(DATASET)
