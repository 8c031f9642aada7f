"""Segments: several sequences of a sample side by side, joined along the axis of tokens.

Products with weights, norms and feed-forward layers look at single tokens. On segments of all lengths in one array they
are few and large, and each weight has one gradient. Attention alone asks where a segment begins: segment i of the
tokens that ask reads segment i of the tokens that answer.

Axes: B batch, T = Σ lengths tokens of all segments, Q tokens that ask, K tokens that answer, C segments of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import groupby

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

Lengths = tuple[int, ...]  # tokens of each segment


@flax.struct.dataclass
class Slots:
    """Some tokens of every segment: their places among all T tokens, and how many each segment has."""

    places: Int[Array, "B S"]
    lengths: Lengths = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring segments of one shape: `count` of them, in each of which `queries` tokens ask `keys` tokens."""

    count: int
    queries: int
    keys: int


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of the tokens that ask, and of those that answer; as many of either."""

    queries: Lengths
    keys: Lengths

    @property
    def runs(self) -> list[Run]:
        """What can be computed together."""
        shapes = groupby(zip(self.queries, self.keys, strict=True))
        return [Run(len(list(same)), *shape) for shape, same in shapes]

    def of_queries(self, x: Shaped[Array, "B T *D"]) -> list[Shaped[Array, "_ _ *D"]]:
        """(B·C, Q, …) of each run."""
        return cut(x, [(run.count, run.queries) for run in self.runs])

    def of_keys(self, x: Shaped[Array, "B T *D"]) -> list[Shaped[Array, "_ _ *D"]]:
        """(B·C, K, …) of each run."""
        return cut(x, [(run.count, run.keys) for run in self.runs])

    def read(self, attention: Callable, query: Array, answers: Sequence[Array | None], keys: Sequence) -> Array:
        """`attention(run, query, *answers, key)` of each run, its results (B·C, Q, …) side by side: (B, T, …).

        `answers` are arrays over the tokens that answer, or None; `keys` has one for each run.
        """
        runs = self.runs
        cut_answers = [[None] * len(runs) if x is None else self.of_keys(x) for x in answers]
        per_run = zip(runs, self.of_queries(query), *cut_answers, keys, strict=True)
        return join([attention(*arguments) for arguments in per_run], query.shape[0])


def cut(x: Shaped[Array, "B T *D"], shapes: Sequence[tuple[int, int]]) -> list[Shaped[Array, "_ _ *D"]]:
    """(B·count, length, …) for each (count, length), which follow one another along the axis of tokens."""
    parts = jax.lax.split(x, [count * length for count, length in shapes], axis=1)
    return [part.reshape(-1, length, *x.shape[2:]) for part, (_, length) in zip(parts, shapes, strict=True)]


def join(parts: Sequence[Shaped[Array, "_ _ *D"]], batch: int) -> Shaped[Array, "B T *D"]:
    """Undoes `cut`."""
    return jnp.concatenate([part.reshape(batch, -1, *part.shape[2:]) for part in parts], axis=1)
