"""Attention pictures: the brightest place is where the attention is, a picture a word, a strip a clip."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from scl_jax.inference.texts import AttentionMap
from scl_jax.plots_attention import attention_sheet, overlay

TEXT = "a red star, and a ring"


def attention_of(frames):
    words = [(0, 1), (2, 5), (6, 10), (10, 11), (12, 15), (16, 17), (18, 22)]
    offsets = np.array([(0, 0), *words, (0, 0)], np.int32)
    word_ids = np.array([-1, 0, 1, 2, 3, 4, 5, 6, -1], np.int32)
    tokens = np.random.default_rng(0).random((9, frames, 6, 6))
    return AttentionMap(TEXT, np.full((frames, 96, 96, 3), 200, np.uint8), tokens, offsets, word_ids)


def test_the_overlay_is_brightest_where_the_attention_is():
    attention = np.zeros((4, 4))
    attention[3, 1] = 0.2
    picture = overlay(np.full((64, 64, 3), 90, np.uint8), attention, pixels=80).astype(int).sum(axis=-1)
    row, column = np.unravel_index(picture.argmax(), picture.shape)
    assert row >= 60 and 20 <= column < 40
    assert picture[5, 70] < 90 * 3  # where there is none, the picture is darkened


def test_words_that_name_something_get_a_picture(tmp_path):
    assert attention_of(1).words == ["a", "red", "star", ",", "and", "a", "ring"]
    few = Image.open(attention_sheet(attention_of(1), tmp_path / "few.png", words=["red"]))
    all_words = Image.open(attention_sheet(attention_of(1), tmp_path / "deep" / "all.png"))
    assert all_words.width > 1.4 * few.width  # five pictures beside three


def test_a_text_without_words_has_no_map_of_a_word(tmp_path):
    offsets, tokens = np.array([(0, 0), (0, 6), (0, 0)], np.int32), np.ones((3, 2, 6, 6))
    frames, word_ids = np.full((2, 96, 96, 3), 200, np.uint8), np.full(3, -1, np.int32)
    found = AttentionMap("<mask>", frames, tokens, offsets, word_ids)
    assert found.words == [] and found.per_word.shape == (0, 2, 6, 6)
    assert attention_sheet(found, tmp_path / "map.png").exists()


def test_the_space_that_a_cut_leaves_is_no_word():
    cut = attention_of(1)
    cut.offsets[7] = (17, 18)  # the space before "ring"
    assert cut.words == ["a", "red", "star", ",", "and", "a"]
    np.testing.assert_array_equal(cut.per_word, attention_of(1).per_word[:6])


def test_a_clip_has_a_row_a_word(tmp_path):
    strip = Image.open(attention_sheet(attention_of(4), tmp_path / "strip.png"))
    one = Image.open(attention_sheet(attention_of(4), tmp_path / "one.png", words=["ring"]))
    assert strip.height > 1.5 * one.height and strip.width == one.width


@pytest.mark.parametrize("word, frames", [("skateboarding", 2), ("pneumonoultramicroscopicsilicovolcanoconiosis", 4)])
def test_long_words_and_the_note_below_stay_within_the_sheet(word, frames, tmp_path):
    attention = attention_of(frames)
    attention.offsets[7] = (18, 18 + len(word))
    attention = dataclasses.replace(attention, text=f"a red star, and a {word}")
    sheet = np.asarray(Image.open(attention_sheet(attention, tmp_path / "map.png", words=[word])).convert("L"))
    assert sheet[:, :3].min() == 255 and sheet[:, -3:].min() == 255


def test_dollar_signs_are_no_formula(tmp_path):
    text = r"is $\frac$, an a"
    attention = dataclasses.replace(attention_of(1), text=text, offsets=attention_of(1).offsets.clip(max=len(text)))
    assert any("$" in word for word in attention.words)
    assert attention_sheet(attention, tmp_path / "map.png").exists()


def test_pdf_is_written_and_other_endings_are_refused(tmp_path):
    assert attention_sheet(attention_of(1), tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="written as"):
        attention_sheet(attention_of(1), tmp_path / "map.txt")


def test_a_word_that_is_not_in_the_text_is_said(tmp_path):
    with pytest.raises(ValueError, match="none of cat is a word"):
        attention_sheet(attention_of(1), tmp_path / "map.png", words=["cat"])
