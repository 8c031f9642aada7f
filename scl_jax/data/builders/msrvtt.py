"""MSR-VTT with the split 1k-A of JSFusion, as "msrvtt/captions".

    MSRVTT_data.json                           {"sentences": [{"video_id", "caption", …}, …], …}
    MSRVTT_train.9k.csv                        video_id
    MSRVTT_JSFUSION_test.csv                   key, vid_key, video_id, sentence
    videos/all/video0.mp4                      (or videos/video0.mp4)

`train` has 20 captions a clip, `test` the one of the table. Arrow files of the same columns as ViLT's, with the
encoded clip in `video`: msrvtt_{train,test}.arrow.
"""

from collections import defaultdict
from pathlib import Path

from scl_jax.data.builders.caption_files import Place, Problem, UnusableError
from scl_jax.data.builders.raw import Counts, Entries, RawDataset, RawItem, RawSplits, RawText, raw_builder
from scl_jax.data.builders.raw_files import Located, arrow_captions, each, numbered, read_json, required, table, value


def read_tree(source: Path) -> RawSplits:
    """The clips of each table, those of `train` with their sentences of the JSON file."""
    return RawSplits({"train": _train(source), "test": _test(source)})


def _train(source: Path) -> Entries:
    clips = required(source, "MSRVTT_train.9k.csv")
    file = required(source, "MSRVTT_data.json")
    captions = defaultdict(list)
    for place, sentence in numbered(file, read_json(file, "sentences")):
        try:
            captions[value(sentence, "video_id", str)].append(RawText(value(sentence, "caption", object)))
        except UnusableError as error:
            yield Problem(place, str(error))

    def make(place: Place, entry: dict[str, str]) -> RawItem:
        name = value(entry, "video_id", str)
        if name not in captions:
            raise UnusableError(f"MSRVTT_data.json has no sentence of {name!r}")
        return RawItem(place, name, (_clip(source, name),), tuple(captions[name]))

    yield from each(table(clips, ","), make)


def _test(source: Path) -> Entries:
    def make(place: Place, entry: dict[str, str]) -> RawItem:
        name = value(entry, "video_id", str)
        return RawItem(place, name, (_clip(source, name),), (RawText(value(entry, "sentence", str)),))

    yield from each(table(required(source, "MSRVTT_JSFUSION_test.csv"), ","), make)


def _clip(source: Path, name: str) -> Located:
    return Located(source, (f"videos/all/{name}.mp4", f"videos/{name}.mp4"))


DATASET = RawDataset(
    name="msrvtt",
    config="captions",
    read_tree=read_tree,
    read_arrow=arrow_captions({"train": ("msrvtt_train*.arrow",), "test": ("msrvtt_test*.arrow",)}, "video"),
    published={"train": Counts(9_000, 180_000), "test": Counts(1_000, 1_000)},
    medium="video",
)
make_builder = raw_builder(DATASET)
