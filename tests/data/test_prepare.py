"""Facts about the command `python -m scl_jax.data.prepare`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import raw_trees
from PIL import Image

from scl_jax.data import prepare
from scl_jax.data.builders import open_source
from scl_jax.data.builders.problems import BrokenRecordsError
from scl_jax.data.prepare import check_tokenizer, prepare_dataset, write_tokenizer
from scl_jax.data.tokens import load_tokenizer

NAME = "own_data/pets"
CAPTIONS = ["a red cat on a red chair", "a cat and another cat", "a cat, a chair and a red dog"] * 2
ROOT = Path(__file__).parents[2]


@pytest.fixture
def pets(tmp_path):
    rows = []
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"a red cat number {i} on a chair"})
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(folder, *arguments):
    command = [sys.executable, "-m", "scl_jax.data.prepare", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def options(folder):
    return {"captions": [str(folder / "pets.jsonl")], "media": str(folder), "validation": 0.2, "test": 0}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def add_broken_row(folder):
    with (folder / "pets.jsonl").open("a") as file:
        file.write('{"image": "gone.png", "caption": "a ghost"}\n')


def test_command_writes_shards_and_a_tokenizer_of_the_training_captions(pets):
    flags = ("--dataset=own_data/pets", "--captions=pets.jsonl", "--media=.", "--validation=0.2", "--test=0")
    done = run(pets, *flags, "--out=data", "--train_tokenizer=tokenizer", "--vocab_size=300")
    assert done.returncode == 0, done.stderr
    counts = [len(open_source(NAME, split, pets / "data")) for split in ("train", "validation")]
    assert sum(counts) == 12 and min(counts) > 0
    assert "train" in done.stderr and "written to data/own_data/pets/1.0.0" in done.stderr
    assert load_tokenizer(pets / "tokenizer").vocab_size <= 300
    assert names(pets / "data") == ["own_data"]


def test_the_tokenizers_folder_is_looked_at_before_anything_is_written(pets):
    write_tokenizer(CAPTIONS, pets / "tokenizer", 300, overwrite=False)
    flags = ("--dataset=own_data/pets", "--captions=pets.jsonl", "--media=.", "--out=data")
    refused = run(pets, *flags, "--train_tokenizer=tokenizer", "--vocab_size=300")
    assert refused.returncode == 1 and not (pets / "data").exists()
    assert "tokenizer holds a tokenizer already; " in refused.stderr and "Traceback" not in refused.stderr


def test_a_tokenizer_that_could_not_be_written_is_known_before(tmp_path):
    place = tmp_path / "tokenizer"
    check_tokenizer(place, 300, written=True, overwrite=False)
    with pytest.raises(ValueError, match="vocab_size 100: at least"):
        check_tokenizer(place, 100, written=True, overwrite=False)
    write_tokenizer(CAPTIONS, place, 300, overwrite=False)
    check_tokenizer(place, 300, written=False, overwrite=False)  # of data sets that are kept: it may be the same one
    check_tokenizer(place, 300, written=True, overwrite=True)
    (place / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds other files; choose another folder"):
        check_tokenizer(place, 300, written=False, overwrite=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        check_tokenizer(tmp_path / "file", 300, written=False, overwrite=True)


def test_command_stops_at_broken_records_and_shows_them(pets):
    add_broken_row(pets)
    flags = ("--dataset=own_data/pets", "--captions=pets.jsonl", "--media=.", "--out=data")
    with (pets / "pets.jsonl").open("a") as file:
        file.write('{"image": "0.png", "caption": "a cat", "[/url]": "x"}\n')
    stopped = run(pets, *flags)
    assert stopped.returncode == 1
    assert "left out: pets.jsonl, line 13: no file 'gone.png'" in stopped.stderr
    assert "1 of 13 records cannot be used" in stopped.stderr and "--skip_broken" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    skipped = run(pets, *flags, "--skip_broken")
    assert skipped.returncode == 0, skipped.stderr
    assert "left out in all: 1" in skipped.stderr
    assert "caption files: 1 row(s) with '[/url]', which is not used" in skipped.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a data set"),
        (["--dataset=own_data/pets"], "--captions=FILE"),
        (["--dataset=toy_world", "--media=x"], "no such option --media"),
        (["--dataset=nothing/here"], "no builder 'nothing'"),
    ],
)
def test_command_answers_mistakes_with_one_line(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_help_shows_commands_as_they_are_typed():
    assert "--format=nlvr \\\n        --media=nlvr/dev/images\n" in (prepare.__doc__ or "")


def test_command_compares_a_public_set_with_what_is_published(tmp_path):
    raw_trees.vqav2(tmp_path / "vqa", tmp_path / "arrow")
    image = tmp_path / "vqa/test2015/COCO_test2015_000000000005.jpg"
    content = image.read_bytes()
    image.unlink()
    flags = ("--dataset=vqav2/questions", "--source=vqa", "--out=data", "--splits=test")
    stopped = run(tmp_path, *flags)
    assert stopped.returncode == 1
    assert "left out: vqa/v2_OpenEnded_mscoco_test2015_questions.json, line 1: 5: no file" in stopped.stderr
    image.write_bytes(content)
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "447,793" in done.stderr and "written to data/vqav2/questions/1.0.0" in done.stderr
    assert names(tmp_path / "data") == ["vqav2"]


@pytest.mark.slow
def test_toy_world_means_both_of_its_configs(tmp_path):
    flags = ("--dataset=toy_world", "--train=20", "--validation=5", "--test=5", "--out=data")
    for expected in ("written to", "already there, kept"):
        done = run(tmp_path, *flags, "--train_tokenizer=tokenizer", "--vocab_size=400")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(expected) == 2
    assert len(open_source("toy_world/images", "train", tmp_path / "data")) == 20
    assert len(open_source("toy_world/videos", "test", tmp_path / "data")) == 5


def test_own_data_already_there_is_an_error_and_overwrite_replaces_it(pets):
    out = pets / "data"
    folder, written = prepare_dataset(NAME, out, overwrite=False, options=options(pets))
    assert written and folder == out / NAME / "1.0.0"
    with pytest.raises(ValueError, match="pass --overwrite"):
        prepare_dataset(NAME, out, overwrite=False, options=options(pets))
    prepare_dataset(NAME, out, overwrite=True, options={**options(pets), "validation": 0})
    assert len(open_source(NAME, "train", out)) == 12
    assert names(out) == ["own_data"] and names(out / NAME) == ["1.0.0"]


def test_failed_overwrite_leaves_the_shards_as_they_were(pets):
    out = pets / "data"
    folder, _ = prepare_dataset(NAME, out, overwrite=False, options=options(pets))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    add_broken_row(pets)
    with pytest.raises(BrokenRecordsError):
        prepare_dataset(NAME, out, overwrite=True, options=options(pets))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(out / NAME) == ["1.0.0", "left_out.jsonl"]
    prepare_dataset(NAME, out, overwrite=True, options={**options(pets), "skip_broken": True})
    assert names(out / NAME) == ["1.0.0"]
    assert "left_out.jsonl" in names(folder)


def test_another_tokenizer_in_the_folder_is_not_replaced_silently(tmp_path):
    folder = tmp_path / "tokenizer"
    size = write_tokenizer(CAPTIONS, folder, 300, overwrite=False)
    assert write_tokenizer(CAPTIONS, folder, 300, overwrite=False) == size
    with pytest.raises(ValueError, match="--overwrite"):
        write_tokenizer(CAPTIONS, folder, 270, overwrite=False)
    assert write_tokenizer(CAPTIONS, folder, 270, overwrite=True) < size
