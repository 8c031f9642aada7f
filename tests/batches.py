"""What tests of batches share: a tokenizer that needs no files, and comparisons."""

import numpy as np


class Letters:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str, length: int) -> dict[str, np.ndarray]:
        ids = np.zeros(length, np.int32)
        letters = text.encode()[:length]
        ids[: len(letters)] = list(letters)
        return {"token_ids": ids, "token_mask": ids > 0, "word_ids": np.where(ids > 0, 0, -1).astype(np.int32)}


def text_of(ids: np.ndarray) -> str:
    return bytes(ids[ids > 0].tolist()).decode()


def take(batches, count: int) -> list[dict]:
    return [next(batches) for _ in range(count)]


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
