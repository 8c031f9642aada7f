"""Prepared records to batches: the journey of one example.

1. `builders.open_source` opens the shards of each data set; several data sets of a stream are concatenated. A record's
   index there is its `item_id`. Records that are left out (screening.py) are not counted, as if they were not there.
2. Grain shuffles the indices (anew each epoch) and repeats for ever. From here on an example has a place in one endless
   order which depends on the seed alone, and its own random generator, seeded by that place.
3. One of the record's captions is drawn; crop, flip and RandAugment are drawn; the picture is decoded, as small as the
   crop allows (a clip: a random frame of each interval); the same transform is applied to every frame; the caption is
   tokenized.
4. A process takes the rows out of every global batch that its devices hold (`rows_of`), so the global batches are the
   same for any number of processes and any order of devices. Only these rows are decoded, by a pool of threads.
5. Whole batches of images and of videos are mixed by their shares, by index; the iterator's state is one number, the
   batches already taken, whatever the number of processes.

Evaluation walks over items, captions or pairs once, in order; the last batch is filled with rows of weight 0.
Downstream tasks, where every text is an example of its own: task_pipeline.py.

Axes: B rows of this process's batch, F frames (1 for an image), H W pixels, L text tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import grain
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from scl_jax.data import images, video
from scl_jax.data.records import NOTHING, LeftOut, Record, Records

NumpyBatch: TypeAlias = dict[str, Any]  # the fields of scl_jax.types.Batch as numpy arrays, and more where said
_IDS = frozenset(("item_id", "caption_id", "example_id"))  # -1 in rows of padding
Config: TypeAlias = Any  # a ConfigDict of scl_jax.config, whose values have no static types
RowsOf: TypeAlias = Callable[[int], Sequence[int]]  # size of a global batch → its rows that this process makes


class Tokenizer(Protocol):
    """What the pipeline needs of `scl_jax.data.tokens.Tokenizer`."""

    def encode(self, text: str, length: int) -> dict[str, np.ndarray]:
        """token_ids int32 (L,), token_mask bool (L,), word_ids int32 (L,)."""
        ...


# ---- training ----


def train_dataset(
    data: Config,
    *,
    seed: int,
    tokenizer: Tokenizer,
    rows_of: RowsOf = range,
    left_out: Mapping[str, LeftOut] = NOTHING,
) -> grain.IterDataset[NumpyBatch]:
    """The endless training batches of this process (`data` is `config.data`).

    Yields the fields of `scl_jax.types.Batch` as numpy arrays with the rows of each global batch that `rows_of` names
    (all, by default), and "stream" ("images" or "videos"). A stream with no data set or of share 0 is off. The
    iterator's state is {"next_index": batches taken}: the same for every process and any number of processes.
    `data.threads` threads decode rows, `data.prefetch` batches are kept ready. left_out: by stream.

    Raises:
        ValueError: no stream is on.
    """

    def make_examples(name: str, rng: np.random.SeedSequence) -> grain.MapDataset[NumpyBatch]:
        stream = data[name]
        records = Records(stream.datasets, "train", data.dir, left_out.get(name, NOTHING))
        return endless_examples(records, TrainExample(stream, data.text_length, tokenizer), rng)

    return mixed_batches(data, make_examples, seed, rows_of)


def mixed_batches(
    data: Config,
    make_examples: Callable[[str, np.random.SeedSequence], grain.MapDataset[NumpyBatch]],
    seed: int,
    rows_of: RowsOf,
) -> grain.IterDataset[NumpyBatch]:
    """Steps 4 and 5 of the journey for the streams that are on; `make_examples` gives the endless ones of a name."""
    batches, shares = [], []
    threads = max(1, data.threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="scl-data")
    for name, stream in (("images", data.images), ("videos", data.videos)):
        if not any(stream.datasets) or stream.share == 0:
            continue
        rows = rows_of(stream.batch_size)
        examples = make_examples(name, np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
        batches.append(_ProcessBatches(examples, stream.batch_size, rows, pool, threads, name))
        shares.append(stream.share)
    if not batches:
        raise ValueError("no training data: name data sets in data.images.datasets or data.videos.datasets (share > 0)")
    # two batches are in the making at once, so that the pool stays busy while the last rows of one are finished
    read_options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(2, data.prefetch))
    return grain.MapDataset.mix(batches, weights=shares).to_iter_dataset(read_options)


def endless_examples(
    source: Any, make_example: Callable[[Any, np.random.Generator], NumpyBatch], seeds: np.random.SeedSequence
) -> grain.MapDataset[NumpyBatch]:
    """Step 2 of the journey: the endless order of what `source` holds, each made into an example when asked for."""
    order_seed, example_seed = seeds.generate_state(2)
    shuffled = grain.MapDataset.source(source).shuffle(seed=int(order_seed)).repeat()
    return shuffled.random_map(make_example, seed=int(example_seed))


class TrainExample:
    """Record and random generator → one training example (step 3 of the journey)."""

    def __init__(self, stream: Config, text_length: int, tokenizer: Tokenizer):
        self._size, self._frames = stream.image_size, stream.frames
        self._crop_scale, self._flip = tuple(stream.crop_scale), stream.flip
        self._rand_augment = tuple(stream.rand_augment)
        self._fast = stream.resize == "fast"
        self._text_length, self._tokenizer = text_length, tokenizer

    def __call__(self, record: Record, rng: np.random.Generator) -> NumpyBatch:
        number = int(rng.integers(max(1, len(record.captions))))
        return self.with_text(record, number, rng)

    def with_text(self, record: Record, number: int, rng: np.random.Generator) -> NumpyBatch:
        """The example of a record and the text of this number."""
        caption = record.caption(number)
        pixels = self.pixels(record, record.media, caption, rng)
        tokens = self._tokenizer.encode(caption, self._text_length)
        return {"pixels": pixels, **tokens, "weight": np.float32(1), "item_id": np.int32(record.item_id)}

    def pixels(
        self, record: Record, media: bytes, caption: str, rng: np.random.Generator
    ) -> UInt8[np.ndarray, "F H W 3"]:
        """An image or clip of a record, augmented; `caption` decides whether it may be flipped."""
        return _decoding(record, lambda: self._augmented(media, caption, rng))

    def _augmented(self, media: bytes, caption: str, rng: np.random.Generator) -> UInt8[np.ndarray, "F H W 3"]:
        if self._frames > 1 or video.is_video(media):
            clip = decode_clip(media, self._frames, rng=rng)
            drawn = self._draw((clip.shape[2], clip.shape[1]), caption, rng)
            if self._fast:
                return np.stack([images.augment_fast(frame, drawn) for frame in clip])
            return np.stack([images.augment(Image.fromarray(frame), drawn) for frame in clip])
        opened = images.open_image(media)
        drawn = self._draw(images.upright_size(opened), caption, rng)
        if self._fast:
            return images.augment_fast(images.load_pixels(opened, drawn.sufficient_size()), drawn)[None]
        return images.augment(images.load_rgb(opened, drawn.sufficient_size()), drawn)[None]

    def _draw(self, image_size: tuple[int, int], caption: str, rng: np.random.Generator) -> images.Augmentation:
        return images.draw_augmentation(
            image_size, self._size, self._crop_scale, self._flip, self._rand_augment, caption, rng
        )


class _ProcessBatches(grain.MapDataset):
    """Batch k of one process: its rows of examples k·batch_size to (k+1)·batch_size, made by a pool of threads.

    A thread makes several rows at a time: handing over single ones costs a tenth of a small picture's decoding.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        batch_size: int,
        rows: Sequence[int],
        pool: ThreadPoolExecutor,
        threads: int,
        stream: str,
    ):
        super().__init__(examples)
        self._batch_size, self._pool, self._stream = batch_size, pool, stream
        few = max(1, len(rows) // (4 * threads))
        self._pieces = [rows[start : start + few] for start in range(0, len(rows), few)]

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        first = index * self._batch_size

        def make(rows: Sequence[int]) -> list[NumpyBatch]:
            return [cast(NumpyBatch, self._parent[first + row]) for row in rows]

        examples = [example for piece in self._pool.map(make, self._pieces) for example in piece]
        return {**_stack(examples), "stream": self._stream}


# ---- evaluation ----


def evaluation_set(
    stream_config: Config,
    dataset_names: Sequence[str],
    split: str,
    *,
    data_dir: str,
    text_length: int,
    tokenizer: Tokenizer,
    batch_size: int,
    max_items: int = 0,
    rows_of: RowsOf = range,
    threads: int = 8,
    left_out: LeftOut = NOTHING,
) -> EvaluationSet:
    """Opens a split for evaluation at the frames and image size of `stream_config` (`config.data.images` or `.videos`).

    batch_size: of one batch over all processes; this process gets the rows that `rows_of` names. max_items: a gallery
    of that many items, evenly spaced over the split; 0 for all. Reads every record once, for the captions.

    Raises:
        ValueError: no data set is named, or a caption is empty.
    """
    rows = EvaluationRows(batch_size, np.asarray(rows_of(batch_size)), threads)
    records = Records(dataset_names, split, data_dir, left_out)
    encode = EvaluationEncoder(stream_config.image_size, stream_config.frames, text_length, tokenizer)
    return EvaluationSet(records, max_items, encode, rows)


@dataclass(frozen=True)
class EvaluationEncoder:
    """Pixels and tokens of one record without anything random."""

    image_size: int
    frames: int
    text_length: int
    tokenizer: Tokenizer

    def pixels(self, record: Record, media: bytes) -> UInt8[np.ndarray, "F H W 3"]:
        """An image or clip of a record."""
        frames = _decoding(record, lambda: _evenly_spaced(media, self.frames))
        return np.stack([images.resize_square(frame, self.image_size) for frame in frames])

    def tokens(self, caption: str) -> dict[str, np.ndarray]:
        """Of one text, as `Tokenizer.encode` gives them."""
        return self.tokenizer.encode(caption, self.text_length)


@dataclass(frozen=True)
class EvaluationRows:
    """Which rows this process makes, and their making: threads, padding, one batch ahead."""

    batch_size: int
    own: Int[np.ndarray, " rows"]
    threads: int

    def batches(self, count: int, make: Callable[[int], NumpyBatch]) -> Iterator[NumpyBatch]:
        """Batches over `make(0)` … `make(count - 1)`; rows after these repeat the last with weight 0 and ids -1."""
        with ThreadPoolExecutor(max(1, self.threads), thread_name_prefix="scl-evaluation") as pool:

            def submit(start: int) -> tuple[np.ndarray, list[Future[NumpyBatch]]]:
                rows = start + self.own
                clipped = np.minimum(rows, count - 1).tolist()
                futures = {row: pool.submit(make, row) for row in dict.fromkeys(clipped)}
                return rows < count, [futures[row] for row in clipped]

            starts = range(0, count, self.batch_size)
            ahead = submit(0)
            for start in starts:
                real, futures = ahead
                if start != starts[-1]:
                    ahead = submit(start + self.batch_size)
                batch = _stack([future.result() for future in futures])
                for name in batch.keys() & _IDS:
                    batch[name] = np.where(real, batch[name], -1).astype(np.int32)
                yield {**batch, "weight": real.astype(np.float32)}


class EvaluationSet:
    """A split for evaluation: its items (images or clips) and captions, each exactly once and in order.

    Items count from 0 to num_items - 1 within this set, captions from 0 to num_captions - 1; `item_id` and
    `caption_id` are these numbers. All batches have the same shape; padding rows have weight 0 and ids -1.
    """

    captions: list[str]
    caption_item: Int[np.ndarray, " captions"]  # the item that each caption describes

    def __init__(self, records: Records, max_items: int, encode: EvaluationEncoder, rows: EvaluationRows):
        self._records, self._encode, self._rows = records, encode, rows
        self.num_items = min(max_items, len(records)) if max_items else len(records)
        self.captions = []
        owners: list[int] = []
        with ThreadPoolExecutor(max(1, rows.threads)) as pool:
            for item, captions in enumerate(pool.map(self._captions, range(self.num_items))):
                self.captions.extend(captions)
                owners.extend([item] * len(captions))
        self.caption_item = np.asarray(owners, np.int32)
        self._first_caption = np.searchsorted(self.caption_item, np.arange(self.num_items))

    @property
    def num_captions(self) -> int:
        """Captions of all items."""
        return len(self.captions)

    def items(self) -> Iterator[NumpyBatch]:
        """Batches of pixels (B, F, H, W, 3), weight, item_id: every item once."""
        return self._rows.batches(self.num_items, self._item)

    def texts(self) -> Iterator[NumpyBatch]:
        """Batches of token_ids, token_mask, word_ids (B, L), weight, caption_id and item_id: every caption once."""
        return self._rows.batches(self.num_captions, self._text)

    def pairs(self) -> Iterator[NumpyBatch]:
        """Batches with all fields of `scl_jax.types.Batch`: every item once, with its first caption."""
        return self._rows.batches(self.num_items, self._pair)

    def name(self, item: int) -> str:
        """The owner's id of an item."""
        return self._record(item).name

    def frames(self, item: int) -> UInt8[np.ndarray, "F H W 3"]:
        """The pixels of one item as the model sees them, for retrieval sheets."""
        record = self._record(item)
        return self._encode.pixels(record, record.media)

    def _record(self, item: int) -> Record:
        return self._records[item * len(self._records) // self.num_items]

    def _captions(self, item: int) -> list[str]:
        record = self._record(item)
        return [record.caption(index) for index in range(max(1, len(record.captions)))]

    def _item(self, item: int) -> NumpyBatch:
        return {"pixels": self.frames(item), "item_id": np.int32(item)}

    def _text(self, caption: int) -> NumpyBatch:
        tokens = self._encode.tokens(self.captions[caption])
        return {**tokens, "item_id": self.caption_item[caption], "caption_id": np.int32(caption)}

    def _pair(self, item: int) -> NumpyBatch:
        return {**self._item(item), **self._encode.tokens(self.captions[self._first_caption[item]])}


# ---- both ----


def decode_clip(media: bytes, frames: int, *, rng: np.random.Generator | None = None) -> UInt8[np.ndarray, "F H W 3"]:
    """`video.decode_frames`, also of a GIF; any other picture is a clip of one frame, which is repeated."""
    if not video.is_video(media) and not media.startswith(b"GIF8"):
        try:
            return np.repeat(images.decode_image(media)[None], frames, axis=0)
        except images.UnknownFormatError:
            pass
    return video.decode_frames(media, frames, rng=rng)


def _evenly_spaced(media: bytes, frames: int) -> list[Image.Image]:
    if frames > 1 or video.is_video(media):
        return [Image.fromarray(frame) for frame in decode_clip(media, frames)]
    return [images.load_rgb(images.open_image(media))]


def _decoding(record: Record, decode: Callable[[], Any]) -> Any:
    """Runs `decode` and gives its ValueError the origin of the record."""
    try:
        return decode()
    except ValueError as error:
        raise record.error(str(error), "repair or leave out this file and prepare the data set again") from error


def _stack(examples: list[NumpyBatch]) -> NumpyBatch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
