"""Facts about the batches: their order, their rows per process, their resumption, their padding."""

import io
import subprocess
import sys

import av
import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from batches import Letters, assert_same, take, text_of
from PIL import Image

from scl_jax.config import default_config
from scl_jax.data import builders, pipeline

TEXT_LENGTH = 12


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def clip(seed: int, width: int = 32) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(seed)
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, 32, "yuv420p", 4
        for _ in range(6):
            pixels = np.broadcast_to(rng.integers(0, 255, 3, dtype=np.uint8), (32, width, 3)).copy()
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def records(count: int, media, name: str) -> list[dict]:
    captions = [[f"{name}{i} one", f"{name}{i} two"][: 1 + i % 2] for i in range(count)]
    return [{"id": f"{name}{i}", "media": media(i), "captions": captions[i]} for i in range(count)]


@pytest.fixture
def sources(monkeypatch):
    sources = {
        "first/images": records(11, picture, "a"),
        "second/images": records(7, lambda i: picture(100 + i), "b"),
        "some/videos": records(9, clip, "v"),
    }
    monkeypatch.setattr(builders, "open_source", lambda name, split, data_dir: sources[name], raising=False)
    return sources


@pytest.fixture
def data(sources):
    data = default_config().data
    data.images.update(datasets=("first/images", "second/images"), batch_size=8, image_size=16, share=0.75)
    data.images.rand_augment = (2, 9)
    data.videos.update(datasets=("some/videos",), batch_size=4, image_size=16, share=0.25, frames=3)
    data.update(text_length=TEXT_LENGTH, threads=3, prefetch=3)
    return data


def iterator(data, seed=0, rows_of=range):
    return iter(pipeline.train_dataset(data, seed=seed, tokenizer=Letters(), rows_of=rows_of))


def share(process: int, count: int):
    """The rows of one of `count` processes, dealt out in turn: a process's rows need not be neighbours."""
    return lambda batch_size: range(process, batch_size, count)


def dealt_out(parts: list[np.ndarray]) -> np.ndarray:
    """Undoes `share`."""
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def test_the_resize_decides_nothing_but_pixels(data):
    bicubic = take(iterator(data), 8)
    for stream in (data.images, data.videos):
        stream.resize = "fast"
    for one, other in zip(take(iterator(data), 8), bicubic, strict=True):
        assert one.pop("pixels").shape == other.pop("pixels").shape
        assert_same([one], [other])


def test_batches_have_the_fields_of_batch_and_alternate_by_share(data):
    batches = take(iterator(data), 8)
    assert [batch["stream"] for batch in batches].count("videos") == 2
    for batch in batches:
        rows, frames = (8, 1) if batch["stream"] == "images" else (4, 3)
        expected = {
            "pixels": ((rows, frames, 16, 16, 3), np.uint8),
            "token_ids": ((rows, TEXT_LENGTH), np.int32),
            "token_mask": ((rows, TEXT_LENGTH), np.bool_),
            "word_ids": ((rows, TEXT_LENGTH), np.int32),
            "weight": ((rows,), np.float32),
            "item_id": ((rows,), np.int32),
        }
        found = {name: (value.shape, value.dtype) for name, value in batch.items() if name != "stream"}
        assert found == expected
        assert (batch["weight"] == 1).all()


def test_an_epoch_shows_every_item_once_in_a_new_order(data):
    data.videos.share = 0.0
    items = np.concatenate([batch["item_id"] for batch in take(iterator(data), 9)])  # 72 = 4 epochs of 11 + 7
    epochs = items.reshape(4, 18)
    for epoch in epochs:
        assert sorted(epoch) == list(range(18))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_captions_belong_to_their_items_and_all_are_drawn(data, sources):
    data.videos.share = 0.0
    everything = sources["first/images"] + sources["second/images"]
    seen = set()
    for batch in take(iterator(data), 20):
        for item, ids in zip(batch["item_id"], batch["token_ids"], strict=True):
            assert text_of(ids) in everything[item]["captions"]
            seen.add(text_of(ids))
    assert seen == {caption for record in everything for caption in record["captions"]}


def test_the_seed_decides(data):
    assert_same(take(iterator(data, seed=1), 3), take(iterator(data, seed=1), 3))
    one, other = (next(iterator(data, seed=seed))["item_id"].tolist() for seed in (1, 2))
    assert one != other


def test_an_item_is_augmented_anew_in_each_epoch(data):
    data.videos.share, data.images.datasets, data.images.batch_size = 0.0, ("second/images",), 7
    first, second = take(iterator(data), 2)
    ours, theirs = first["pixels"][np.argsort(first["item_id"])], second["pixels"][np.argsort(second["item_id"])]
    assert all((ours[i] != theirs[i]).any() for i in range(7))


@pytest.mark.parametrize("process_count", [2, 4])
def test_any_number_of_processes_gives_the_same_global_batches(data, process_count):
    whole = take(iterator(data), 8)
    parts = [take(iterator(data, rows_of=share(p, process_count)), 8) for p in range(process_count)]
    joined = [
        {name: whole[k]["stream"] if name == "stream" else dealt_out([part[k][name] for part in parts])
         for name in whole[k]}
        for k in range(8)
    ]  # fmt: skip
    assert_same(joined, whole)
    assert all(part[k]["stream"] == whole[k]["stream"] for part in parts for k in range(8))


@pytest.mark.parametrize("batch_size", [8, 32])
def test_any_number_of_threads_gives_the_same_batches(data, batch_size):
    data.images.batch_size, data.threads = batch_size, 1
    expected = take(iterator(data), 4)
    for data.threads in (3, 5):
        assert_same(take(iterator(data), 4), expected)


def test_a_process_reads_only_its_own_rows(data, sources, monkeypatch):
    data.videos.share, data.prefetch = 0.0, 2
    read = []

    class Watching(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    sources["first/images"], sources["second/images"] = Watching(sources["first/images"]), []
    batches = iterator(data, rows_of=share(1, 4))
    items = np.concatenate([batch["item_id"] for batch in take(batches, 5)])
    assert len(read) <= 2 * (5 + 3)  # 2 rows a batch, and what is prefetched
    assert set(items) <= set(read)


def test_one_number_resumes_exactly_also_with_other_numbers_of_processes(data):
    batches = iterator(data)
    take(batches, 3)
    state = batches.get_state()
    assert state == {"next_index": 3}
    expected = take(batches, 5)
    again = iterator(data)
    again.set_state(state)
    assert_same(take(again, 5), expected)
    half = iterator(data, rows_of=share(1, 2))
    half.set_state(state)
    for batch, whole in zip(take(half, 5), expected, strict=True):
        np.testing.assert_array_equal(batch["pixels"], whole["pixels"][1::2])


def test_orbax_saves_and_restores_the_iterator(data, tmp_path):
    batches = iterator(data)
    take(batches, 2)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        again = iterator(data)
        manager.restore(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
    assert_same(take(again, 3), take(batches, 3))


def test_all_frames_of_a_clip_get_the_same_crop(data, sources, monkeypatch):
    still = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(pipeline.video, "decode_frames", lambda media, frames, rng: np.stack([still] * frames))
    data.images.share, data.videos.rand_augment = 0.0, (2, 9)
    pixels = np.concatenate([batch["pixels"] for batch in take(iterator(data), 3)])
    np.testing.assert_array_equal(pixels, np.repeat(pixels[:, :1], 3, axis=1))
    assert (pixels[0] != pixels[1]).any()


@pytest.mark.parametrize("resize", ["bicubic", "fast"])
def test_a_training_clip_is_its_frames_drawn_at_random(data, monkeypatch, resize):
    def decode(media, frames, rng):
        assert rng is not None, "evenly spaced frames are those of evaluation"
        return np.stack([np.full((48, 64, 3), 100 * frame, np.uint8) for frame in range(frames)])

    monkeypatch.setattr(pipeline.video, "decode_frames", decode)
    data.images.share, data.videos.resize = 0.0, resize
    pixels = next(iterator(data))["pixels"]
    assert [np.unique(pixels[:, frame]).tolist() for frame in range(3)] == [[0], [100], [200]]


def test_a_clip_in_a_stream_of_images_is_one_of_its_frames(data, sources):
    sources["first/images"], data.videos.share = records(11, clip, "c"), 0.0
    data.images.datasets = ("first/images",)
    for batch in (next(iterator(data)), next(evaluation(data, ("first/images",), batch_size=8).items())):
        assert batch["pixels"].shape == (8, 1, 16, 16, 3)


def test_the_crop_is_drawn_for_the_upright_size_and_the_flip_for_the_caption(data, sources, monkeypatch):
    exif, buffer, drawn = Image.Exif(), io.BytesIO(), []
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    sources["first/images"] = [{"id": "0", "media": buffer.getvalue(), "captions": ["a picture"]}]
    sources["some/videos"] = [{"id": "0", "media": clip(0, 48), "captions": ["a clip"]}]
    original = pipeline.images.draw_augmentation

    def draw(size, *options):
        drawn.append((size, options[-2]))
        return original(size, *options)

    monkeypatch.setattr(pipeline.images, "draw_augmentation", draw)
    data.images.update(datasets=("first/images",), batch_size=1, share=0.5)
    data.videos.update(batch_size=1, share=0.5)
    take(iterator(data), 2)
    assert set(drawn) == {((30, 40), "a picture"), ((48, 32), "a clip")}


def test_streams_and_seeds_have_orders_of_their_own(data):
    states = []

    def make_examples(name, seeds):
        states.append(tuple(seeds.generate_state(2)))
        return grain.MapDataset.source(range(8))

    for seed in (0, 1):
        pipeline.mixed_batches(data, make_examples, seed, range)
    assert len(set(states)) == 4


def test_nothing_to_train_on_is_an_error(data):
    data.images.datasets, data.videos.share = ("",), 0.0
    with pytest.raises(ValueError, match="no training data: name data sets"):
        iterator(data)


def test_a_broken_record_is_named(data, sources):
    data.videos.share = 0.0
    sources["second/images"][4]["media"] = picture(0)[:200]
    with pytest.raises(ValueError, match=r"second/images, split train, record 4 \(id 'b4'\): cannot decode PNG"):
        take(iterator(data), 9)


def test_an_empty_caption_is_named(data, sources):
    data.videos.share = 0.0
    sources["first/images"][2]["captions"] = [" "]
    with pytest.raises(ValueError, match=r"first/images, split train, record 2 \(id 'a2'\): caption 0 is empty"):
        take(iterator(data), 9)


def test_a_picture_in_a_stream_of_clips_is_upright_and_stands_still():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(20, 20, 3)).resize((40, 20)).save(buffer, "JPEG", exif=exif)
    clip = pipeline.decode_clip(buffer.getvalue(), 3)
    assert clip.shape == (3, 40, 20, 3) and (clip == clip[0]).all()
    animation = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (80 * k, 0, 0)) for k in range(3)]
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert pipeline.decode_clip(animation.getvalue(), 3)[:, 4, 4, 0].tolist() == pytest.approx([0, 80, 160], abs=4)


# ---- evaluation ----


def evaluation(data, names=("first/images", "second/images"), stream="images", **options):
    settings = {"data_dir": "", "text_length": TEXT_LENGTH, "tokenizer": Letters(), "batch_size": 4, **options}
    return pipeline.evaluation_set(data[stream], names, "test", **settings)


def test_every_item_and_caption_counts_once(data, sources):
    gallery = evaluation(data)
    everything = sources["first/images"] + sources["second/images"]
    assert gallery.num_items == 18 and gallery.num_captions == 26
    assert gallery.captions == [caption for record in everything for caption in record["captions"]]
    assert [gallery.captions[i] in everything[item]["captions"] for i, item in enumerate(gallery.caption_item)]
    for batches, ids, count in [(gallery.items(), "item_id", 18), (gallery.texts(), "caption_id", 26)]:
        batches = list(batches)
        weight, numbers = (np.concatenate([batch[name] for batch in batches]) for name in ("weight", ids))
        assert weight.sum() == count and numbers[weight == 1].tolist() == list(range(count))
        assert (numbers[weight == 0] == -1).all()
        assert len({tuple((name, value.shape, value.dtype) for name, value in b.items()) for b in batches}) == 1


def test_texts_are_the_captions_with_their_owners(data):
    gallery = evaluation(data)
    for batch in gallery.texts():
        for row in np.flatnonzero(batch["weight"]):
            assert text_of(batch["token_ids"][row]) == gallery.captions[batch["caption_id"][row]]
            assert batch["item_id"][row] == gallery.caption_item[batch["caption_id"][row]]


@pytest.mark.parametrize(
    ("names", "stream", "frames"), [(("some/videos",), "videos", 3), (("first/images",), "images", 1)]
)
def test_pairs_are_items_with_their_first_captions(data, sources, names, stream, frames):
    gallery = evaluation(data, names, stream)
    pairs = list(gallery.pairs())
    for pair, item in zip(pairs, gallery.items(), strict=True):
        np.testing.assert_array_equal(pair["pixels"], item["pixels"])
        assert pair["pixels"].shape == (4, frames, 16, 16, 3)
        for row in np.flatnonzero(pair["weight"]):
            assert text_of(pair["token_ids"][row]) == sources[names[0]][pair["item_id"][row]]["captions"][0]


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_evaluation_batches(data, process_count):
    whole = list(evaluation(data).pairs())
    parts = [list(evaluation(data, rows_of=share(p, process_count)).pairs()) for p in range(process_count)]
    joined = [{name: dealt_out([part[k][name] for part in parts]) for name in whole[k]} for k in range(len(whole))]
    assert_same(joined, whole)


def test_a_smaller_gallery_is_spread_over_the_split(data, sources):
    gallery = evaluation(data, ("first/images",), max_items=4)
    assert gallery.num_items == 4
    assert [gallery.captions[gallery.caption_item.tolist().index(i)] for i in range(4)] == [
        "a0 one",
        "a2 one",
        "a5 one",
        "a8 one",
    ]
    assert evaluation(data, ("first/images",), max_items=100).num_items == 11


def test_an_unfinished_iteration_can_be_left(data):
    gallery = evaluation(data)
    next(gallery.items())
    assert len(list(gallery.items())) == 5


def test_a_broken_record_is_named_at_evaluation(data, sources):
    sources["some/videos"][3]["media"] = b"no video"
    with pytest.raises(ValueError, match=r"some/videos, split test, record 3 \(id 'v3'\): cannot decode video"):
        list(evaluation(data, ("some/videos",), "videos").items())


def test_an_evaluated_clip_is_its_frames_without_anything_random(data, monkeypatch):
    def decode(media, frames, rng):
        assert rng is None
        return np.stack([np.full((48, 64, 3), 100 * frame, np.uint8) for frame in range(frames)])

    monkeypatch.setattr(pipeline.video, "decode_frames", decode)
    pixels = evaluation(data, ("some/videos",), "videos").frames(0)
    assert [np.unique(frame).tolist() for frame in pixels] == [[0], [100], [200]]


def test_frames_of_an_item_are_what_the_model_sees(data):
    examples = evaluation(data)
    np.testing.assert_array_equal(examples.frames(0), next(iter(examples.items()))["pixels"][0])


def test_data_modules_import_no_jax_of_their_own():
    code = "import sys, scl_jax.data.images, scl_jax.data.video; assert 'jax' not in sys.modules, 'jax imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
