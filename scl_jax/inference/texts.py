"""What users hand in as a text → token ids; and where the words of a text look in an image.

Axes: B batch, L tokens, W words, F frames, rows and columns of patches.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from scl_jax.data.tokens import Tokenizer

MOST_CHARACTERS = 10_000


class TextError(ValueError):
    """A text that cannot be used; the message says why and what to do."""


def as_texts(texts: str | Sequence[str], hint: str = "") -> tuple[list[str], bool]:
    """A list of texts, and whether it was a single one.

    Args:
        hint: is added where something else than a text was given: the order of arguments, perhaps.

    Raises:
        TextError: no text, an empty one, one that is no valid Unicode, or one far beyond what the model reads.
    """
    if not isinstance(texts, str) and (isinstance(texts, bytes) or not isinstance(texts, Iterable)):
        raise TextError(f"a text or a list of texts is expected, not a {type(texts).__name__}{hint}")
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found:
        raise TextError("an empty list of texts")
    for text in found:
        if not isinstance(text, str):
            raise TextError(f"a text is expected, not a {type(text).__name__}{hint}")
        if not text.strip():
            raise TextError("the text is empty: write a few words")
        if len(text) > MOST_CHARACTERS:
            raise TextError(f"a text of {len(text)} characters: at most {MOST_CHARACTERS} are taken")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise TextError(
                f"the text is no valid Unicode: character {error.start + 1} is {code}, half of a pair, or a byte that "
                "was not decoded; leave it out, or read the text with the right encoding"
            ) from error
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
        """The words in order, none where the text is `<mask>` alone; punctuation is a word."""
        return [word for _, word in self._numbered_words()]

    @property
    def per_word(self) -> Float[np.ndarray, "W F rows columns"]:
        """A map for each of `words`: those of its sub-words summed, which together can exceed 1."""
        maps = [self.tokens[self.word_ids == number].sum(axis=0) for number, _ in self._numbered_words()]
        return np.stack(maps) if maps else self.tokens[:0]

    def _numbered_words(self) -> list[tuple[int, str]]:
        """The words with their numbers; of the last one a cut may leave the space before it, which is none."""
        spans = [(int(number), self.offsets[self.word_ids == number]) for number in np.unique(self.word_ids)]
        texts = [(number, self.text[span[:, 0].min() : span[:, 1].max()].strip()) for number, span in spans]
        return [(number, word) for number, word in texts if number >= 0 and word]

    def phrase(self, start: int, end: int) -> Float[np.ndarray, "F rows columns"]:
        """The map of the characters `start` to `end` (past the last): all tokens that overlap them, summed.

        Raises:
            TextError: the model reads none of them.
        """
        inside = (self.offsets[:, 0] < end) & (self.offsets[:, 1] > start) & (self.word_ids >= 0)
        if not inside.any():
            raise TextError(f"no token of {self.text[start:end]!r} is among those that the model reads")
        return self.tokens[inside].sum(axis=0)
