"""What users hand in as a text → token ids; and where the words of a text look in an image.

Axes: B batch, L tokens, W words, F frames, rows and columns of patches.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from scl_jax.data.tokens import Tokenizer

MOST_CHARACTERS = 10_000


class TextError(ValueError):
    """A text that cannot be used; the message says why and what to do."""


def as_texts(texts: str | Sequence[str]) -> tuple[list[str], bool]:
    """A list of texts, and whether it was a single one.

    Raises:
        TextError: no text, an empty one, or one far beyond what the model reads.
    """
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found:
        raise TextError("an empty list of texts")
    for text in found:
        if not isinstance(text, str):
            raise TextError(f"a text is expected, not a {type(text).__name__}")
        if not text.strip():
            raise TextError("the text is empty: write a few words")
        if len(text) > MOST_CHARACTERS:
            raise TextError(f"a text of {len(text)} characters: at most {MOST_CHARACTERS} are taken")
    return found, isinstance(texts, str)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """token_ids, token_mask, word_ids (B, L) and offsets (B, L, 2); warns about texts that are cut."""
    encoded = [tokenizer.encode_with_offsets(text, length) for text in texts]
    for text, tokens in zip(texts, encoded, strict=True):
        if tokens["token_mask"].all() and tokens["offsets"][-2, 1] < len(text.rstrip()):
            kept = text[: int(tokens["offsets"][-2, 1])]
            warnings.warn(f"the model reads {length} tokens: cut after {kept[-30:]!r}", stacklevel=3)
    return {name: np.stack([tokens[name] for tokens in encoded]) for name in encoded[0]}


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Cross-attention of a text to the patches of an image or clip: last text fusion layer, maximum over heads.

    The weights are those of the softmax over all visual tokens; what goes to the [CLS] tokens is left out, so that
    a map sums to at most the number of heads.
    """

    text: str
    frames: UInt8[np.ndarray, "F H W 3"]  # as the model saw them
    tokens: Float[np.ndarray, "L F rows columns"]
    offsets: Int[np.ndarray, "L 2"]  # characters of each token; (0, 0) at special tokens
    word_ids: Int[np.ndarray, " L"]

    @property
    def overall(self) -> Float[np.ndarray, "F rows columns"]:
        """The map of the text's [CLS]."""
        return self.tokens[0]

    @property
    def words(self) -> list[str]:
        """The words in order; punctuation is a word."""
        spans = [self.offsets[self.word_ids == word] for word in range(int(self.word_ids.max()) + 1)]
        return [self.text[span[:, 0].min() : span[:, 1].max()].strip() for span in spans]

    @property
    def per_word(self) -> Float[np.ndarray, "W F rows columns"]:
        """A map for each word, its sub-words summed."""
        count = int(self.word_ids.max()) + 1
        return np.stack([self.tokens[self.word_ids == word].sum(axis=0) for word in range(count)])

    def phrase(self, start: int, end: int) -> Float[np.ndarray, "F rows columns"]:
        """The map of the characters `start` to `end` (past the last): all tokens that overlap them, summed.

        Raises:
            TextError: the model reads none of them.
        """
        inside = (self.offsets[:, 0] < end) & (self.offsets[:, 1] > start) & (self.word_ids >= 0)
        if not inside.any():
            raise TextError(f"no token of {self.text[start:end]!r} is among those that the model reads")
        return self.tokens[inside].sum(axis=0)
