"""Facts about tokens.py: static shapes, words of the byte-level vocabulary, folders, threads, training."""

import json
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest

from scl_jax.data import tokens
from scl_jax.data.tokens import SPECIAL_TOKENS, load_tokenizer, train_tokenizer

CAPTIONS = [
    "the red star moves left, then up",
    "a big blue circle is above a small red star",
    "it's left of the red-and-blue star; the circle isn't",
] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, folder, vocab_size=360)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def words_of(tokenizer, text, length=80):
    """The characters of each word id, in order."""
    encoded = tokenizer.encode_with_offsets(text, length)
    words = {}
    for word, (start, end) in zip(encoded["word_ids"].tolist(), encoded["offsets"].tolist(), strict=True):
        if word >= 0:
            first, last = words.get(word, (start, end))
            words[word] = (min(first, start), max(last, end))
    assert list(words) == list(range(len(words)))
    return [text[start:end].strip() for start, end in words.values()]


def test_special_tokens_open_the_vocabulary_in_robertas_order(tokenizer):
    ids = [tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id]
    assert ids == [0, 1, 2, 3, 4]
    assert 261 < tokenizer.vocab_size <= 360


def test_encoding_has_the_static_shape_of_a_batch_row(tokenizer):
    encoded = tokenizer.encode("the red star", 12)
    assert {key: (value.dtype.name, value.shape) for key, value in encoded.items()} == {
        "token_ids": ("int32", (12,)),
        "token_mask": ("bool", (12,)),
        "word_ids": ("int32", (12,)),
    }
    count = int(encoded["token_mask"].sum())
    assert encoded["token_ids"][0] == 0 and encoded["token_ids"][count - 1] == 2
    assert (encoded["token_ids"][count:] == 1).all() and (encoded["word_ids"][count - 1 :] == -1).all()
    assert encoded["word_ids"][0] == -1 and (encoded["word_ids"][1 : count - 1] >= 0).all()


def test_truncated_caption_keeps_its_end_token(tokenizer):
    whole = tokenizer.encode(CAPTIONS[1], 64)["token_ids"]
    cut = tokenizer.encode(CAPTIONS[1], 6)
    assert cut["token_ids"].tolist() == [*whole[:5].tolist(), 2]
    assert cut["token_mask"].all() and cut["word_ids"][-1] == -1


@pytest.mark.parametrize("length", [0, 1])
def test_length_without_room_for_both_ends_is_refused(tokenizer, length):
    with pytest.raises(ValueError, match="at least 2"):
        tokenizer.encode("a", length)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the red star moves left, then up", ["the", "red", "star", "moves", "left", ",", "then", "up"]),
        ("it's a red-and-blue star.", ["it's", "a", "red-and-blue", "star", "."]),
        ('"left"  (of)\tunbelievable!!', ['"', "left", '"', "(", "of", ")", "unbelievable", "!!"]),
        ("  café 星 🙂 ", ["café", "星", "🙂"]),
        ("...", ["..."]),
        ("'s left", ["'s", "left"]),  # one token of two words
        ("   ", []),
        ("", []),
    ],
)
def test_word_ids_follow_white_space_and_set_edge_punctuation_apart(tokenizer, text, words):
    assert words_of(tokenizer, text) == words


def test_all_pieces_of_a_rare_word_share_its_id(tokenizer):
    encoded = tokenizer.encode("the xylophone star", 40)
    ids = encoded["word_ids"][encoded["word_ids"] >= 0]
    assert (ids == 1).sum() > 3
    assert ids.tolist() == sorted(ids.tolist())


def test_mask_written_in_the_text_keeps_its_id_and_is_no_word(tokenizer):
    encoded = tokenizer.encode("the <mask> star", 16)
    assert encoded["word_ids"][encoded["token_ids"] == tokenizer.mask_id].tolist() == [-1]


def test_offsets_point_at_the_characters_of_each_token(tokenizer):
    text = "the red star moves left, then up"
    encoded = tokenizer.encode_with_offsets(text, 40)
    inside = encoded["word_ids"] >= 0
    pieces = [text[start:end] for start, end in encoded["offsets"][inside]]
    assert "".join(pieces) == text.replace(" ", "")
    assert (encoded["offsets"][~inside] == 0).all()


def test_ids_are_those_of_transformers(folder, tokenizer):
    from transformers import RobertaTokenizerFast

    theirs = RobertaTokenizerFast.from_pretrained(folder)
    for text in [*CAPTIONS[:3], "  odd   spacing ", "naïve 🙂"]:
        expected = theirs(text, max_length=20, truncation=True, padding="max_length")
        ours = tokenizer.encode(text, 20)
        assert ours["token_ids"].tolist() == expected["input_ids"]
        assert ours["token_mask"].astype(int).tolist() == expected["attention_mask"]


def test_decode_gives_the_text_back_and_shows_masks(tokenizer):
    ids = tokenizer.encode(CAPTIONS[0], 40)["token_ids"]
    assert tokenizer.decode(ids) == CAPTIONS[0]
    assert "<mask>" in tokenizer.decode([0, tokenizer.mask_id, 2, 1])


def test_pickled_and_saved_tokenizers_encode_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    expected = tokenizer.encode(CAPTIONS[2], 30)
    unpickled = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301  (bytes of our own)
    for other in (unpickled, load_tokenizer(tmp_path / "copy")):
        for key, value in other.encode(CAPTIONS[2], 30).items():
            np.testing.assert_array_equal(value, expected[key])
        assert other.vocab_size == tokenizer.vocab_size


def test_tokenizers_are_the_same_by_what_they_hold(tokenizer, tmp_path):
    """However often they were saved, and in which files; not by their size."""
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    copy.save(tmp_path / "again")
    model = json.loads((tmp_path / "copy/tokenizer.json").read_text())["model"]
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "vocab.json").write_text(json.dumps(model["vocab"]))
    (parts / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    for same in (copy, load_tokenizer(tmp_path / "again"), load_tokenizer(parts)):
        assert tokenizer.same_as(same) and same.same_as(tokenizer)
    words = ["big", "blue", "circle", "star", "above", "left"]
    other = train_tokenizer([f"{word} {word}" for word in words] * 8, tmp_path / "other", tokenizer.vocab_size)
    assert not tokenizer.same_as(other)
    model["vocab"]["Ġ"], model["vocab"]["a"] = model["vocab"]["a"], model["vocab"]["Ġ"]
    (parts / "vocab.json").write_text(json.dumps(model["vocab"]))
    swapped = load_tokenizer(parts)
    assert swapped.vocab_size == tokenizer.vocab_size and not tokenizer.same_as(swapped)


def test_threads_with_different_lengths_do_not_disturb_each_other(tokenizer):
    def encode(i):
        return tokenizer.encode(CAPTIONS[i % 3], 5 + i % 30)["token_ids"].tolist()

    expected = [encode(i) for i in range(300)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encode, range(300))) == expected


def test_training_is_deterministic(folder, tokenizer, tmp_path):
    train_tokenizer(CAPTIONS, tmp_path, vocab_size=360)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_vocabulary_too_small_or_no_captions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 261"):
        train_tokenizer(CAPTIONS, tmp_path, vocab_size=100)
    with pytest.raises(ValueError, match="no caption"):
        train_tokenizer([], tmp_path, vocab_size=300)


def test_missing_tokenizer_says_to_give_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="give the folder"):
        load_tokenizer("nobody/no-such-tokenizer")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer("some/missing/folder")
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_of_another_kind_is_refused(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    vocab = {"[UNK]": 0, "red": 1, **{token: 2 + i for i, token in enumerate(SPECIAL_TOKENS)}}
    Backend(models.WordPiece(vocab, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_transformers_does_not_say_at_every_start_that_it_has_no_models(monkeypatch):
    class Transformers(ModuleType):
        def __getattr__(self, name):
            return os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")

    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", Transformers("transformers"))
    assert tokens._roberta() == "1"
    assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ  # the user's own use of transformers
