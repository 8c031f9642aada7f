"""Retrieval metrics from scores: recall@k and the median rank, with several right answers and with ties.

Tied scores are counted as if their order were drawn at random, and the expected value is reported. A model that
scores everything alike therefore gets chance, never 100 %, and the figure does not depend on the order of the items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Targets = Sequence[int] | Sequence[Sequence[int]] | np.ndarray  # per query: the right item, or all the right items


class Place(NamedTuple):
    """Where a query's first right item comes: `better` wrong items before it, `tied` wrong ones beside it.

    `equals` right items share the best right score.
    """

    better: int
    tied: int
    equals: int

    def hit_probability(self, k: int) -> float:
        """The chance that a right item is among the first k when the tied items are shuffled."""
        slots = k - self.better  # places of the first k that are left for the tied items
        if slots <= 0:
            return 0.0
        miss = 1.0  # all slots go to wrong items: C(tied, slots) / C(tied + equals, slots)
        for taken in range(min(slots, self.tied + 1)):
            miss *= (self.tied - taken) / (self.tied + self.equals - taken)
        return 1.0 - miss

    def expected_rank(self) -> float:
        """The rank, from 1, of the first right item when the tied items are shuffled."""
        return self.better + (self.tied + self.equals + 1) / (self.equals + 1)


def place(scores: Float[np.ndarray, " I"], right: Int[np.ndarray, " R"]) -> Place:
    """Finds the best of the `right` items among the `scores` of one query.

    Raises:
        ValueError: a score is not a number, or the query has no right item.
    """
    if right.size == 0:
        raise ValueError("a query has no right item: leave it out of the queries")
    if np.isnan(scores).any():
        raise ValueError("a retrieval score is NaN: look for non-finite features or parameters")
    best = scores[right].max()
    equals = int(np.count_nonzero(scores[right] == best))
    better = int(np.count_nonzero(scores > best))  # no right item scores higher than the best of them
    tied = int(np.count_nonzero(scores == best)) - equals
    return Place(better, tied, equals)


def places(scores: Iterable[np.ndarray], targets: Targets) -> list[Place]:
    """The place of every query's first right item; `scores` yields one row of item scores a query.

    Raises:
        ValueError: the numbers of rows and targets differ, or see `place`.
    """
    rows = zip(scores, targets, strict=True)
    return [place(np.asarray(row), np.unique(np.atleast_1d(np.asarray(right, int)))) for row, right in rows]


def recall_at_k(scores: Iterable[np.ndarray], targets: Targets, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """The share of queries with a right item among the k highest scores.

    Args:
        scores: (queries, items), or any iterable of its rows.
        targets: per query the index of its right item, or the indices of all of them (any one counts).
        ks: the cut-offs.

    Returns:
        k → recall in [0, 1], expected over random orders of tied items.
    """
    found = places(scores, targets)
    return {k: float(np.mean([where.hit_probability(k) for where in found])) for k in ks}


def median_rank(scores: Iterable[np.ndarray], targets: Targets) -> float:
    """The median over queries of the rank, from 1, of the first right item; arguments as in `recall_at_k`."""
    return float(np.median([where.expected_rank() for where in places(scores, targets)]))
