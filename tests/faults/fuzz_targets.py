"""What fuzz.py tries: for each kind of file, how an input is made and what may become of it.

`check` is True where the input was accepted and what was read has the documented form, False where it was refused with
the documented error. It raises otherwise.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import mutation
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from scl_jax.convert.full_model import MAY_MISS, model_shapes
from scl_jax.convert.rules import DROPS, RULES, ConversionError, torch_to_flax
from scl_jax.convert.torch_config import SCLConfig
from scl_jax.convert.torch_files import TorchFileError, read_tensors
from scl_jax.data import builders, images, video
from scl_jax.data.builders.caption_files import Problem, Row, read_rows
from scl_jax.data.screening import why_unusable
from scl_jax.data.tokens import load_tokenizer
from scl_jax.evaluation.alignment.files import align_bench
from scl_jax.evaluation.alignment.plain_pickle import PickleError
from scl_jax.evaluation.alignment.scores import Example

warnings.simplefilter("ignore")
_SIZE = 24  # pixels, of training crops
_LENGTH = 20  # tokens


class Target:
    """One kind of file. `share`: of all inputs; `kind`: the folder of its seeds."""

    kind: ClassVar[str]
    share: ClassVar[int]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = Path(tempfile.mkdtemp(prefix="work-", dir=folder))
        files = sorted((folder / "seeds" / self.kind).iterdir()) if self.kind else []
        self.seeds = {file.name.removeprefix("seed"): file.read_bytes() for file in files}

    def input(self, dice: random.Random) -> bytes:
        """An input."""
        return mutation.mutate(list(self.seeds.values()), dice)

    def check(self, data: bytes) -> bool:
        """Whether the input is accepted."""
        raise NotImplementedError


def is_rgb(pixels: Any, *shape: int) -> bool:
    """Whether these are uint8 pixels, of this shape before the channels where it is given."""
    return (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.shape[-1] == 3
        and min(pixels.shape) > 0
        and (not shape or pixels.shape[:-1] == shape)
    )


# ---- media ----


class Pictures(Target):
    """What decodes has the size its header promises, and goes through the training transforms, too."""

    kind, share = "images", 38

    def input(self, dice: random.Random) -> bytes:
        data = super().input(dice)
        return mutation.with_png_checksums(data) if data[:4] == b"\x89PNG" and dice.random() < 0.7 else data

    def check(self, data: bytes) -> bool:
        try:
            pixels = images.decode_image(data)
        except ValueError:
            return False
        opened = images.open_image(data)
        width, height = images.upright_size(opened)
        assert is_rgb(pixels, height, width) and width * height <= images.MAX_PIXELS
        rng = np.random.default_rng(len(data))
        drawn = images.draw_augmentation((width, height), _SIZE, (0.5, 1.0), "always", (2, 9), "", rng)
        bicubic = images.augment(images.load_rgb(opened, drawn.sufficient_size()), drawn)
        fast = images.augment_fast(images.load_pixels(images.open_image(data), drawn.sufficient_size()), drawn)
        assert is_rgb(bicubic, _SIZE, _SIZE) and is_rgb(fast, _SIZE, _SIZE)
        return True


class Clips(Target):
    """A clip that decodes for the check decodes for training, whatever frames are drawn."""

    kind, share = "clips", 12

    def check(self, data: bytes) -> bool:
        try:
            checked = video.decode_frames(data, 2)
        except ValueError:
            return False
        assert is_rgb(checked) and checked.ndim == 4 and len(checked) == 2
        for seed in range(2):
            drawn = video.decode_frames(data, 3, rng=np.random.default_rng(seed))
            assert is_rgb(drawn) and drawn.ndim == 4 and len(drawn) == 3
        return True


# ---- shards ----


class Shards(Target):
    """A damaged shard is refused, or gives records that were written: its checksums do not let others through."""

    kind, share, name = "", 5, "toy_world/questions"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shutil.copytree(folder / "data", self.scratch / "data")
        sources = [builders.open_source(self.name, split, self.scratch / "data") for split in ("train", "validation")]
        self.shard = sources[0].shards[0].path
        self.seeds = {source.shards[0].path.name: source.shards[0].path.read_bytes() for source in sources}
        self.written = [self._texts(source[index]) for source in sources for index in range(len(source))]

    @staticmethod
    def _texts(record: dict[str, Any]) -> tuple:
        return record["id"], record["media"], tuple(record["captions"]), tuple(record.get("text_ids", ()))

    def check(self, data: bytes) -> bool:
        self.shard.write_bytes(data)
        builders._count_records.cache_clear()  # files change faster than the clock of the file system
        whole, read = True, 0
        try:
            source = builders.open_source(self.name, "train", self.scratch / "data")
        except builders.ShardError:
            source, whole = builders.open_source(self.name, "train", self.scratch / "data", whole=False), False
        for index in range(len(source)):
            bad = why_unusable(source, index, clips=False)
            assert bad is None or (bad.index == index and bad.reason)
            if bad is None:
                assert self._texts(source[index]) in self.written
                read += 1
        return whole and read == len(source)


class RawRecords(Target):
    """The bytes of a record, behind the checksums: refused, or a record with the features of its data set."""

    kind, share, name, clips = "", 8, "toy_world/questions", False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.source = builders.open_source(self.name, "train", folder / "data")
        reader = ArrayRecordReader(str(self.source.shards[0].path))
        self.seeds = {str(i): reader.read([i])[0] for i in range(reader.num_records())}
        self.source._records.data_source = self  # TFDS reads bytes from here
        self.data = b""

    def __getitem__(self, index: int) -> bytes:
        return self.data

    def __len__(self) -> int:
        return len(self.seeds)

    def check(self, data: bytes) -> bool:
        self.data = data
        try:
            record = self.source[0]
        except builders.ShardError:
            return False
        assert isinstance(record["id"], str) and isinstance(record["media"], bytes)
        assert isinstance(record["captions"], list) and all(isinstance(text, str) for text in record["captions"])
        bad = why_unusable(self.source, 0, clips=self.clips)
        return bad is None


class VideoRecords(RawRecords):
    """The same for a data set of clips."""

    share, name, clips = 3, "toy_world/videos", True


# ---- texts ----


class CaptionFiles(Target):
    """Rows, each usable or a problem with its place; no row leads out of the media folder."""

    kind, share = "captions", 12

    def input(self, dice: random.Random) -> bytes:
        number = dice.randrange(len(self.seeds))
        return bytes([number]) + mutation.mutate([list(self.seeds.values())[number]], dice)

    def check(self, data: bytes) -> bool:
        suffix = list(self.seeds)[data[0]]
        file, media = self.scratch / f"captions{suffix}", self.folder / "media"
        file.unlink(missing_ok=True)  # a mapped file is not to change
        file.write_bytes(data[1:])
        from scl_jax.data.builders.caption_files import arrow_table

        arrow_table.cache_clear()
        form = {".jsonl": "jsonl", ".json": "nlvr", ".arrow": "arrow"}.get(suffix, "csv")
        try:
            rows = list(read_rows(file, form, media, "", ""))
            cells = [row.media.read() for row in rows if isinstance(row, Row)]
        except ValueError:
            return False
        assert all(isinstance(cell, bytes) for cell in cells)
        for row in rows:
            if isinstance(row, Problem):
                assert row.reason and row.place.file == str(file)
                continue
            assert row.captions and all(text.strip() and "\0" not in text and text.encode() for text in row.captions)
            if suffix != ".arrow":
                assert (media / row.media.name).resolve().is_relative_to(media.resolve())
        return any(isinstance(row, Row) for row in rows)


class Texts(Target):
    """Any text becomes the fixed number of tokens, with its ends, known ids and words numbered without gaps."""

    kind, share = "texts", 6

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tokenizer = load_tokenizer(folder / "tokenizer")

    def check(self, data: bytes) -> bool:
        text = data.decode("utf-8", errors="replace")
        encoded, tokenizer = self.tokenizer.encode(text, _LENGTH), self.tokenizer
        ids, mask, words = encoded["token_ids"], encoded["token_mask"], encoded["word_ids"]
        count = int(mask.sum())
        assert ids.shape == mask.shape == words.shape == (_LENGTH,) and mask[:count].all() and count >= 2
        assert ids[0] == tokenizer.bos_id and ids[count - 1] == tokenizer.eos_id
        assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all() and (ids[count:] == tokenizer.pad_id).all()
        assert sorted(set(words[words >= 0].tolist())) == list(range(words.max() + 1))
        assert (words[[0, count - 1]] == -1).all() and (words[count:] == -1).all()
        return True


# ---- weights and pickles ----


class Safetensors(Target):
    """Weights with every name and shape as they were, or an error here or in the converter."""

    kind, share = "safetensors", 4
    suffix = ".safetensors"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        original = read_tensors(folder / "exported" / "model.safetensors")
        self.form = {name: (value.shape, value.dtype) for name, value in original.items()}
        self.shapes = model_shapes(SCLConfig.infer({name: shape for name, (shape, _) in self.form.items()}))

    def check(self, data: bytes) -> bool:
        path = self.scratch / f"weights{self.suffix}"
        path.unlink(missing_ok=True)  # a mapped file is not to change
        path.write_bytes(data)
        try:
            tensors = read_tensors(path)
        except TorchFileError:
            return False
        assert all(value.nbytes < 10**7 and value.copy() is not None for value in tensors.values())
        if {name: (value.shape, value.dtype) for name, value in tensors.items()} == self.form:
            return True
        try:
            flat, _ = torch_to_flax(tensors, self.shapes, rules=RULES, drops=DROPS, may_miss=MAY_MISS)
        except ConversionError:
            return False
        changed = {name for name, value in tensors.items() if self.form.get(name) != (value.shape, value.dtype)}
        missing = set(self.form) - set(tensors)
        raise AssertionError(f"{len(flat)} parameters in spite of changed {changed} and missing {missing}")


class TorchZip(Safetensors):
    """Half of them with checksums that fit, so that what lies behind them is tried."""

    kind, share, suffix = "torch_zip", 6, ".pt"

    def input(self, dice: random.Random) -> bytes:
        if dice.random() < 0.5:
            return super().input(dice)

        def changed(name: str, content: bytes) -> bytes:
            return mutation.mutate([content], dice) if name.endswith("data.pkl") else content

        return mutation.with_zip_checksums(dice.choice(list(self.seeds.values())), changed)


class TorchLegacy(Safetensors):
    """Read by torch.load(weights_only=True)."""

    kind, share, suffix = "torch_legacy", 2, ".pt"


class Annotations(Target):
    """Pickles of ALIGN-BENCH: data or an error; nothing is run, and nothing imported."""

    kind, share = "annotations", 7

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.scratch / "images").mkdir()
        (self.scratch / "pkls").mkdir()
        Image.new("RGB", (64, 48)).save(self.scratch / "images" / "1.png")
        import torch  # noqa: F401  (tensors in a pickle are read by it)

        self.begun = False  # the first file may bring in what reads it

    def check(self, data: bytes) -> bool:
        (self.scratch / "pkls" / "1.pkl").write_bytes(data)
        before = {name for name in sys.modules if not name.startswith("torch.")}  # torch brings its own in when needed
        try:
            (example,) = align_bench(self.scratch)
            accepted = True
        except PickleError:
            accepted, example = False, None
        assert not (self.folder / "canary").exists()
        added = {name for name in sys.modules if not name.startswith("torch.")} - before
        assert not added or not self.begun, added
        self.begun = True
        assert example is None or isinstance(example, Example)
        return accepted


TARGETS: dict[str, Callable[[Path], Target] | Any] = {
    "pictures": Pictures,
    "clips": Clips,
    "shards": Shards,
    "records": RawRecords,
    "video_records": VideoRecords,
    "caption_files": CaptionFiles,
    "texts": Texts,
    "safetensors": Safetensors,
    "torch_zip": TorchZip,
    "torch_legacy": TorchLegacy,
    "annotations": Annotations,
}
