"""Whatever a file holds: it is read as what it should be, or refused with a reason. The long run is faults/fuzz.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faults import fuzz_seeds
from faults.mutation import mutate, with_png_checksums
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scl_jax.data import images, video
from scl_jax.data.builders.caption_files import Problem, Row, read_rows
from scl_jax.data.tokens import load_tokenizer, train_tokenizer

LENGTH = 16
DICE = st.integers(0, 2**32).map(random.Random)
quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text.replace("\0", "") for text in fuzz_seeds.TEXTS], folder, 330)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def pictures():
    return list(fuzz_seeds.pictures().values())


@pytest.fixture(scope="module")
def clips():
    return list(fuzz_seeds.clips().values())


def assert_encodes(tokenizer, text):
    encoded = tokenizer.encode(text, LENGTH)
    ids, count, words = encoded["token_ids"], int(encoded["token_mask"].sum()), encoded["word_ids"]
    assert ids.shape == (LENGTH,) and 2 <= count <= LENGTH and ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    assert ids[0] == tokenizer.bos_id and ids[count - 1] == tokenizer.eos_id and (ids[count:] == tokenizer.pad_id).all()
    assert sorted(set(words[words >= 0].tolist())) == list(range(words.max() + 1))


@quick
@given(text=st.text(max_size=200))
def test_any_text_is_a_row_of_tokens(tokenizer, text):
    assert_encodes(tokenizer, text)


@pytest.mark.parametrize(
    "text",
    [
        "\0",
        "a\0b",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "قطة على اليمين",
        "\u202eמימין לשמאל\u202c",
        "x" * 100_000,
        "a b!? " * 17_000,
        "\n" * 100_000,
    ],
    ids=["NUL", "NUL within", "emoji", "Arabic", "right to left", "100 kB word", "100 kB words", "100 kB lines"],
)
def test_odd_texts_are_rows_of_tokens(tokenizer, text):
    assert_encodes(tokenizer, text)
    decoded = tokenizer.decode(tokenizer.encode(text, 10 + 4 * min(len(text), 100))["token_ids"])
    assert text.strip().startswith(decoded[:20].strip())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@quick
@given(dice=DICE)
def test_a_damaged_picture_is_refused_or_has_its_size(pictures, dice):
    data = mutate(pictures, dice)
    data = with_png_checksums(data) if data[:4] == b"\x89PNG" else data
    try:
        pixels = images.decode_image(data)
    except ValueError as error:
        assert str(error)
        return
    width, height = images.upright_size(images.open_image(data))
    assert pixels.shape == (height, width, 3) and pixels.dtype == np.uint8


@settings(quick, max_examples=40)
@given(dice=DICE)
def test_a_damaged_clip_that_decodes_once_decodes_with_any_frames(clips, dice):
    data = mutate(clips, dice)
    try:
        video.decode_frames(data, 2)
    except ValueError as error:
        assert str(error)
        return
    for seed in range(3):
        frames = video.decode_frames(data, 3, rng=np.random.default_rng(seed))
        assert frames.shape[0] == 3 and frames.shape[-1] == 3 and frames.dtype == np.uint8


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.dictionaries(st.sampled_from(["image", "video", "media", "caption", "captions", "id", "split"]), JSON)


@quick
@given(rows=st.lists(ROWS | JSON, max_size=4), end=st.binary(max_size=6))
def test_every_line_of_a_caption_file_is_a_row_or_a_problem(tmp_path_factory, rows, end):
    folder = tmp_path_factory.mktemp("captions")
    file = folder / "captions.jsonl"
    file.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + end)
    (folder / "a.png").touch()
    found = list(read_rows(file, "jsonl", folder, "", ""))
    assert len(found) >= len(rows)
    for row in found:
        assert isinstance(row, Row) or (isinstance(row, Problem) and row.reason and row.place.line)


@pytest.mark.slow
def test_the_fuzzer_runs_and_finds_nothing():
    command = [sys.executable, str(Path(fuzz_seeds.__file__).with_name("fuzz.py")), "--inputs=550"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split()[0] == "all"
