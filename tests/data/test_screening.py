"""Bad records in shards from elsewhere: refused by name, or found before training, listed and left out."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pytest
from batches import Letters, assert_same, take
from broken_shards import edit_records, remove, shard_of, spoil_jpeg

from scl_jax.config import default_config
from scl_jax.data import screening
from scl_jax.data.builders import ShardError, open_source, prepare
from scl_jax.data.pipeline import evaluation_set, train_dataset
from scl_jax.data.records import RecordError
from scl_jax.data.screening import Part, screen, why_unusable
from scl_jax.data.task_pipeline import task_dataset

IMAGES, QUESTIONS, VIDEOS = "toy_world/images", "toy_world/questions", "toy_world/videos"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    for name in (IMAGES, QUESTIONS, VIDEOS):
        prepare(name, folder, train=10, validation=3, test=2)
    return folder


@pytest.fixture
def shards(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "data")


def data_of(folder, name=IMAGES, frames=1):
    data = default_config().data
    data.update(dir=str(folder), text_length=24, threads=2, prefetch=2)
    data.images.update(datasets=(name,), batch_size=4, image_size=32, frames=frames)
    return data


def batches(data, make=train_dataset, left_out=()):
    left_out = {"images": {(data.images.datasets[0], "train"): left_out}}
    return iter(make(data, seed=3, tokenizer=Letters(), left_out=left_out))


def screened(folder, name=IMAGES, clips=False, split="train", **options):
    options = {"threads": 2, "fallback": folder.parent / "elsewhere"} | options
    return screen(name, split, str(folder), clips=clips, **options)


# ---- reading fails, with a name ----


def cut(data: bytes) -> bytes:
    return data[:-10]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"train\S* is truncated or no array_record file \(.*copy this file again from where it came"),
        (lambda data: data[: len(data) // 2], "is truncated or no array_record file"),
        (lambda data: b"", "is truncated or no array_record file .*at least 64KB"),
        (lambda data: b"<html>not found</html>" * 9000, "is truncated or no array_record file"),
    ],
)
def test_a_shard_without_its_index_is_named_before_training(shards, damage, message):
    shard = shard_of(shards, IMAGES)
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ShardError, match=message):
        batches(data_of(shards))


def test_a_shard_of_another_length_is_named(shards):
    shutil.copy(shard_of(shards, IMAGES, "validation"), shard_of(shards, IMAGES))
    with pytest.raises(ShardError, match="holds 3 records, but 10 were written; copy this file again"):
        batches(data_of(shards))


def test_flipped_bits_in_a_shard_are_noticed(shards):
    shard = shard_of(shards, IMAGES)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    bad = screened(shards)
    assert len(bad) == 1 and bad[0].id == "" and "hash mismatch" in bad[0].reason
    with pytest.raises(ShardError, match=rf"train\S*, record {bad[0].index}: not a record of this data set.*hash"):
        take(batches(data_of(shards)), 9)


@pytest.mark.parametrize("record", [b"", b"no protocol buffer at all", b"\x0a\x00", b"\xff" * 100])
def test_a_record_of_something_else_is_named(shards, record):
    edit_records(shards, IMAGES, {7: lambda _: record})
    with pytest.raises(
        ShardError, match=r"train\S*, record 7: not a record of this data set, with the features .*media"
    ):
        take(batches(data_of(shards)), 9)
    assert [bad.index for bad in screened(shards)] == [7]


def test_broken_metadata_are_an_error_that_names_the_folder(shards):
    info = shard_of(shards, IMAGES).parent / "dataset_info.json"
    info.write_text(info.read_text()[:200])
    with pytest.raises(ShardError, match=r"toy_world/images: \S*2\.0\.0 cannot be opened"):
        batches(data_of(shards))


def test_questions_that_lost_an_answer_are_named(shards):
    metadata = shard_of(shards, QUESTIONS).parent / "metadata.json"
    content = json.loads(metadata.read_text())
    content["classes"] = content["classes"][:2]
    content["texts"]["train"][4] += 1
    metadata.write_text(json.dumps(content))
    with pytest.raises(
        RecordError, match=r"toy_world/questions, split train, record \d .*(none of the 2 classes|promise)"
    ):
        take(batches(data_of(shards, QUESTIONS), task_dataset), 20)
    reasons = {bad.index: bad.reason for bad in screened(shards, QUESTIONS)}
    assert "texts, but the metadata of its data set promise" in reasons[4]
    assert "an answer that is none of the 2 classes" in reasons.values()


# ---- screening ----


def test_exactly_the_bad_records_are_found_with_their_reasons(shards):
    edits = {1: spoil_jpeg, 5: lambda record: b"", 8: spoil_jpeg}
    edit_records(shards, IMAGES, edits)
    bad = screened(shards)
    assert [record.index for record in bad] == [1, 5, 8]
    good = open_source(IMAGES, "train", shards)
    assert [record.id for record in bad] == [good[1]["id"], "", good[8]["id"]]
    assert "cannot decode JPEG" in bad[0].reason and "not a record of this data set" in bad[1].reason
    assert screened(shards, split="test") == []


def test_all_records_of_a_broken_shard_are_bad(shards):
    shard = shard_of(shards, IMAGES)
    shard.write_bytes(cut(shard.read_bytes()))
    bad = screened(shards)
    assert [record.index for record in bad] == list(range(10))
    assert all("truncated" in record.reason for record in bad)


def test_an_empty_text_is_bad_and_other_odd_ones_are_not(tmp_path):
    class Some:
        classes = ()
        captions = [["a cat"], [], ["a cat", " "], ["\0"], ["👩‍👩‍👧 قطة على اليمين"], ["x" * 100_000]]

        def __getitem__(self, index):
            return {"id": str(index), "media": b"GIF89a", "captions": self.captions[index]}

        def noted_texts(self, index):
            return None

    reasons = [why_unusable(Some(), index, clips=False).reason for index in range(6)]  # pyright: ignore
    assert reasons[1:3] == ["caption 0 is empty: there is none", "caption 1 is empty"]
    assert all(reason.startswith("cannot decode") for reason in [reasons[0], *reasons[3:]])  # only the picture is bad


def test_a_stream_of_clips_asks_more_of_its_records(shards):
    assert screened(shards, VIDEOS, clips=True) == []
    assert screened(shards, IMAGES, clips=True) == []  # a picture is a clip of one frame


def test_the_list_is_kept_beside_the_shards_until_they_change(shards, monkeypatch):
    edit_records(shards, IMAGES, {1: spoil_jpeg})
    first = screened(shards)
    looked_at = []
    look = screening.why_unusable
    monkeypatch.setattr(
        screening, "why_unusable", lambda s, index, clips: looked_at.append(index) or look(s, index, clips)
    )
    assert screened(shards) == first and not looked_at
    assert screened(shards, clips=True) == first and len(looked_at) == 10
    looked_at.clear()
    edit_records(shards, IMAGES, {2: spoil_jpeg})
    assert [bad.index for bad in screened(shards)] == [1, 2] and len(looked_at) == 10
    looked_at.clear()
    kept = next(shard_of(shards, IMAGES).parent.glob("screened.images.train.json"))
    kept.write_text(kept.read_text()[:50])
    assert [bad.index for bad in screened(shards)] == [1, 2] and len(looked_at) == 10


def test_shards_in_a_folder_of_others_have_their_list_elsewhere(shards, monkeypatch):
    folder = shard_of(shards, IMAGES).parent
    write = type(folder).write_text

    def refuse(path, *arguments):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return write(path, *arguments)

    monkeypatch.setattr(type(folder), "write_text", refuse)
    assert screened(shards) == []
    assert not list(folder.glob("*screened*"))
    assert len(list((shards.parent / "elsewhere").rglob("screened.images.train.json"))) == 1


def test_processes_look_at_their_parts_and_get_the_same_list(shards):
    edit_records(shards, IMAGES, {0: spoil_jpeg, 3: spoil_jpeg, 8: spoil_jpeg})
    meeting, texts = threading.Barrier(3), [""] * 3
    found: list = [None] * 3

    def process(index):
        def share(text):
            texts[index] = text
            meeting.wait(30)
            everyone = list(texts)
            meeting.wait(30)
            return everyone

        found[index] = screened(shards, part=Part(index, 3, share))

    threads = [threading.Thread(target=process, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bad.index for bad in found[0]] == [0, 3, 8] and found[0] == found[1] == found[2]


# ---- what is left out was never there ----


def test_training_without_bad_records_is_training_on_the_clean_set(shards, tmp_path):
    clean = shutil.copytree(shards, tmp_path / "clean")
    edit_records(clean, IMAGES, {2: remove, 6: remove})
    edit_records(shards, IMAGES, {2: spoil_jpeg, 6: lambda record: record[:40]})
    bad = [record.index for record in screened(shards)]
    assert bad == [2, 6]
    assert_same(take(batches(data_of(shards), left_out=bad), 9), take(batches(data_of(clean)), 9))

    options = {"text_length": 24, "tokenizer": Letters(), "batch_size": 4}
    left_out = {(IMAGES, "train"): bad}
    stream = data_of(shards).images
    ours = evaluation_set(stream, (IMAGES,), "train", data_dir=str(shards), left_out=left_out, **options)
    theirs = evaluation_set(stream, (IMAGES,), "train", data_dir=str(clean), **options)
    assert ours.captions == theirs.captions
    assert_same(list(ours.pairs()), list(theirs.pairs()))


@pytest.mark.parametrize("noted", [True, False])
def test_texts_of_a_task_skip_with_their_record(shards, tmp_path, noted):
    clean = shutil.copytree(shards, tmp_path / "clean")
    edit_records(clean, QUESTIONS, {0: remove, 9: remove})
    edit_records(shards, QUESTIONS, {0: spoil_jpeg, 9: lambda record: b""})
    if not noted:  # nobody noted how many texts a record has: they are counted, of the good ones only
        metadata = shard_of(shards, QUESTIONS).parent / "metadata.json"
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"texts": {}}))
    bad = [record.index for record in screened(shards, QUESTIONS)]
    ours = take(batches(data_of(shards, QUESTIONS), task_dataset, bad), 9)
    assert_same(ours, take(batches(data_of(clean, QUESTIONS), task_dataset), 9))


def test_the_place_in_the_data_resumes_exactly(shards):
    edit_records(shards, IMAGES, {4: spoil_jpeg})
    iterator = batches(data_of(shards), left_out=[4])
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 4)
    resumed = batches(data_of(shards), left_out=[4])
    resumed.set_state(state)
    assert_same(take(resumed, 4), expected)
    assert all(np.isin(batch["item_id"], range(9)).all() for batch in expected)
