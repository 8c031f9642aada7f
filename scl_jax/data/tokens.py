"""Text to token ids: a byte-level BPE of the RoBERTa kind, its words, and its training.

A tokenizer is a folder (`tokenizer.json`, or `vocab.json` and `merges.txt`) or the name of one on the Hugging Face hub.
Axis: L tokens, `<s>`, `</s>` and `<pad>` included.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import ByteLevelBPETokenizer
from tokenizers import Tokenizer as Backend

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # RoBERTa's; a trained vocabulary opens with them
BYTE_ALPHABET = 256
_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
RUN_TOKENIZER = "tokenizer"  # folder in a work directory
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~“”‘’„«»…–—¿¡"


class Tokenizer:
    """A RoBERTa tokenizer that is picklable (for worker processes) and thread-safe.

    It holds the Rust backend without truncation and padding, whose settings threads would share: both are done here.
    """

    def __init__(self, backend: Backend, folder: str = "") -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.folder = folder
        vocabulary = backend.get_vocab(with_added_tokens=True)
        ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
        self.bos_id: int = ids["<s>"]
        self.pad_id: int = ids["<pad>"]
        self.eos_id: int = ids["</s>"]
        self.unk_id: int = ids["<unk>"]
        self.mask_id: int = ids["<mask>"]
        self._special_ids = frozenset(ids.values())

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included (the model pads its table as it needs)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def same_as(self, other: Tokenizer) -> bool:
        """Whether both have the same words under the same numbers, and the same merges in the same order."""
        return self._content() == other._content()

    def _content(self) -> tuple[dict[str, int], list[list[str]]]:
        merges = json.loads(self._backend.to_str())["model"]["merges"]  # pairs; older versions: "a b"
        pairs = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
        return self._backend.get_vocab(with_added_tokens=True), pairs

    def encode(self, text: str, length: int) -> dict[str, Int[np.ndarray, " L"] | Bool[np.ndarray, " L"]]:
        """Encodes a text to exactly `length` tokens: `<s> … </s> <pad> …`; what is too long is cut before `</s>`.

        Returns `token_ids` (int32), `token_mask` (bool, True at every token that is not padding) and `word_ids`
        (int32): 0, 1, 2 … the word a token belongs to, -1 at special tokens and padding. Words are delimited by white
        space; punctuation at their edges is a word of its own, as in BERT's whole-word masking: `it's left,` has the
        three words `it's`, `left` and `,`. A special token written in the text, such as `<mask>`, keeps its id and
        belongs to no word.
        """
        return self._encode(text, length)[0]

    def encode_with_offsets(self, text: str, length: int) -> dict[str, np.ndarray]:
        """Like `encode`, and `offsets` (int32, (L, 2)): a token's first and past-last character; (0, 0) at specials."""
        encoded, kept = self._encode(text, length)
        offsets = np.zeros((length, 2), np.int32)
        if kept:
            offsets[1 : len(kept) + 1] = kept
        return {**encoded, "offsets": offsets}

    def _encode(self, text: str, length: int) -> tuple[dict[str, np.ndarray], list[tuple[int, int]]]:
        """What `encode` returns, and where the tokens between `<s>` and `</s>` begin and end in the text."""
        if length < 2:
            raise ValueError(f"text length {length}: at least 2 tokens are needed, for <s> and </s>")
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids[: length - 2], encoding.offsets[: length - 2]
        numbers: dict[int, int] = {}  # words that own a token, numbered ("'s" is one token but may reach over two)
        words = [
            -1 if word < 0 or token in self._special_ids else numbers.setdefault(word, len(numbers))
            for token, word in zip(ids, _words_of_tokens(text, offsets), strict=True)
        ]
        padding = length - 2 - len(ids)
        encoded = {
            "token_ids": np.array([self.bos_id, *ids, self.eos_id] + [self.pad_id] * padding, np.int32),
            "token_mask": np.arange(length) < len(ids) + 2,
            "word_ids": np.array([-1, *words, -1] + [-1] * padding, np.int32),
        }
        return encoded, offsets

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens except `<mask>`."""
        silent = {self.bos_id, self.pad_id, self.eos_id}
        return self._backend.decode([int(i) for i in ids if int(i) not in silent], skip_special_tokens=False).strip()

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer as a folder that `load_tokenizer` and RobertaTokenizerFast read."""
        _write_folder(_roberta()(tokenizer_object=self._backend), Path(folder).expanduser())


def load_tokenizer(folder_or_name: str | Path) -> Tokenizer:
    """Loads a RoBERTa tokenizer from a folder or, if there is no such folder, by its name on the hub.

    Raises FileNotFoundError when it cannot be found or reached, ValueError when it is not of the RoBERTa kind.
    """
    folder = Path(folder_or_name).expanduser()
    if not folder.is_dir():
        folder = _from_hub(str(folder_or_name))
    if not (folder / "tokenizer.json").is_file() and not all((folder / name).is_file() for name in _FILES[1:]):
        raise FileNotFoundError(
            f"tokenizer folder {folder} holds neither tokenizer.json nor vocab.json and merges.txt; "
            "give the folder that `prepare --train_tokenizer` or `save_pretrained` wrote"
        )
    try:
        backend: Backend = _roberta().from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # the libraries raise bare Exception for files they cannot parse
        raise ValueError(f"tokenizer folder {folder} cannot be read: {error}") from error
    # transformers adds missing special tokens beside the vocabulary, silently: look into the vocabulary itself
    vocabulary = backend.get_vocab(with_added_tokens=False)
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing or len(vocabulary) <= len(SPECIAL_TOKENS) or "Ġ" not in vocabulary:
        raise ValueError(
            f"tokenizer folder {folder} is no byte-level RoBERTa tokenizer ({len(vocabulary)} tokens, "
            f"missing: {', '.join(missing) or 'byte-level tokens'})"
        )
    return Tokenizer(backend, str(folder_or_name))


def load_run_tokenizer(run: Path, named: str) -> Tokenizer:
    """The tokenizer of a run: its own copy, which moves with it, else the one that its config names.

    Raises FileNotFoundError and ValueError as `load_tokenizer` does.
    """
    own = run / RUN_TOKENIZER
    return load_tokenizer(own if own.is_dir() else named)


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError for a vocabulary that `train_tokenizer` cannot keep to."""
    smallest = BYTE_ALPHABET + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size}: at least {smallest}, the bytes and the special tokens")


def train_tokenizer(captions: Iterable[str], folder: str | Path, vocab_size: int = 8192) -> Tokenizer:
    """Trains a byte-level BPE on captions, writes it as a RobertaTokenizerFast folder and returns it.

    The vocabulary opens with SPECIAL_TOKENS and the 256 bytes; it stays below `vocab_size` when the captions are few.
    """
    check_vocab_size(vocab_size)
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        captions, vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    model = json.loads(trainer.to_str())["model"]
    if not model["merges"]:
        raise ValueError("no caption to train a tokenizer on: no two characters appear together twice")
    merges: Any = [tuple(merge) for merge in model["merges"]]  # pairs, which transformers' annotation does not know
    # `vocab=` and `merges=`: the older `vocab_file=` and `merges_file=` silently give a vocabulary of five
    _write_folder(_roberta()(vocab=model["vocab"], merges=merges), Path(folder).expanduser())
    return load_tokenizer(folder)


def _roberta() -> Any:
    """transformers' RobertaTokenizerFast: 1.5 s, so not in worker processes, which unpickle a Tokenizer.

    Where PyTorch is not installed its import says that "models won't be available", at every start: ours are.
    """
    before = os.environ.get(_NO_ADVICE)
    os.environ[_NO_ADVICE] = "1"
    try:
        from transformers import RobertaTokenizerFast
    finally:
        os.environ.pop(_NO_ADVICE)
        os.environ.update({_NO_ADVICE: before} if before is not None else {})
    return RobertaTokenizerFast


def _write_folder(tokenizer: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(str(folder))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    advice = "give the folder of a tokenizer (config.data.tokenizer); `prepare --train_tokenizer=FOLDER` makes one"
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except HFValidationError as error:
        raise FileNotFoundError(f"tokenizer {name!r}: no such folder; {advice}") from error
    except OSError as error:  # not found, no permission, or no connection and nothing cached
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"tokenizer {name!r}: no such folder, and not to be had from the hub ({reason}); {advice}"
        ) from error


def _words_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    # A token belongs to the first word that ends after the token starts: a lone "Ġ" goes with the word it precedes.
    ends = _word_ends(text)
    last = len(ends) - 1  # -1 where the text is white space only
    return [min(bisect.bisect_right(ends, start), last) for start, _ in offsets]


def _word_ends(text: str) -> list[int]:
    ends, position = [], 0
    for chunk in text.split():
        start = text.index(chunk, position)
        position = start + len(chunk)
        core_start = position - len(chunk.lstrip(_PUNCTUATION))
        core_end = start + len(chunk.rstrip(_PUNCTUATION))
        only_punctuation = core_start >= core_end
        ends.extend([position] if only_punctuation else sorted({core_start, core_end, position} - {start}))
    return ends
