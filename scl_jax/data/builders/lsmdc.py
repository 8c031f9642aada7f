"""LSMDC 2016, one sentence a clip, as "lsmdc/captions".

    LSMDC16_annos_training.csv                 clip <tab> four times <tab> sentence, without a first line of names
    LSMDC16_annos_val.csv
    LSMDC16_challenge_1000_publictect.csv      the 1,000 clips of the retrieval test (the owner's spelling)
    videos/<movie>/<clip>.avi                  or videos/<clip>.avi; .mp4 too; or instead
    frames/<movie>/<clip>/*.jpg                a folder of frames in order of their names

Arrow files of the same columns as ViLT's, with the encoded clip in `video`: lsmdc_{train,val,test}.arrow.
"""

import re
from pathlib import Path

from scl_jax.data.builders.caption_files import Place, UnusableError
from scl_jax.data.builders.raw import Counts, Entries, RawDataset, RawItem, RawSplits, RawText, raw_builder
from scl_jax.data.builders.raw_files import Located, arrow_captions, each, required, table

_FILES = {
    "train": "LSMDC16_annos_training.csv",
    "validation": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
_COLUMNS = ("clip", "start_aligned", "end_aligned", "start_extracted", "end_extracted", "sentence")
_TIMES = re.compile(r"_\d\d\.\d\d\.\d\d\.\d+-\d\d\.\d\d\.\d\d\.\d+$")  # behind the movie's name


def read_tree(source: Path) -> RawSplits:
    """A row of a table is a clip."""

    def make(place: Place, entry: dict[str, str]) -> RawItem:
        clip = entry["clip"]
        if _TIMES.search(clip) is None:
            raise UnusableError(f"clip {clip!r} does not end in its times, as in 0001_American_Beauty_00.00.51.926-…")
        movie = _TIMES.sub("", clip)
        files = [f"videos/{folder}{clip}.{suffix}" for folder in (f"{movie}/", "") for suffix in ("avi", "mp4")]
        names = (*files, f"frames/{movie}/{clip}", f"frames/{clip}")
        return RawItem(place, clip, (Located(source, names),), (RawText(entry["sentence"]),))

    def entries(name: str) -> Entries:
        yield from each(table(required(source, name), "\t", _COLUMNS), make)

    return RawSplits({split: entries(name) for split, name in _FILES.items()})


DATASET = RawDataset(
    name="lsmdc",
    config="captions",
    read_tree=read_tree,
    read_arrow=arrow_captions(
        {"train": ("lsmdc_train*.arrow",), "validation": ("lsmdc_val*.arrow",), "test": ("lsmdc_test*.arrow",)}, "video"
    ),
    published={
        "train": Counts(101_079, 101_079),
        "validation": Counts(7_408, 7_408),
        "test": Counts(1_000, 1_000),
    },
    medium="video",
)
make_builder = raw_builder(DATASET)
