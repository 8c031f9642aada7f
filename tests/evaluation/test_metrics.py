"""Recall and rank: several right answers, ties at chance, nonsense refused."""

import math

import numpy as np
import pytest

from scl_jax.evaluation.metrics import median_rank, recall_at_k


def test_recall_counts_the_queries_whose_right_item_is_among_the_first_k():
    scores = np.array([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])
    assert recall_at_k(scores, [0, 1, 2], (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    assert median_rank(scores, [0, 1, 2]) == 2.0


def test_any_of_several_right_items_is_enough_and_counts_once():
    scores = np.array([[5.0, 4, 3, 2]])
    assert recall_at_k(scores, [[3, 1]], (1, 2)) == {1: 0.0, 2: 1.0}
    assert recall_at_k(scores, [[0, 1, 1]], (1,)) == {1: 1.0}
    assert recall_at_k(np.zeros((1, 4)), [[1, 1]], (1,)) == {1: 0.25}  # named twice, it is one item


def test_the_rank_is_the_median_not_the_mean():
    scores = np.tile(np.arange(9.0, 0, -1), (3, 1))
    assert median_rank(scores, [0, 1, 8]) == 2.0


@pytest.mark.parametrize("right", [1, 5])
def test_equal_scores_give_chance(right):
    queries, items = 20, 100
    targets = [list(range(right * query, right * query + right)) for query in range(queries)]
    recall = recall_at_k(np.zeros((queries, items)), targets, (1, 5, 10, 100))
    chance = {k: 1 - math.comb(items - right, k) / math.comb(items, k) for k in (1, 5, 10, 100)}
    assert recall == pytest.approx(chance)
    assert median_rank(np.zeros((queries, items)), targets) == pytest.approx((items + 1) / (right + 1))


def test_ties_get_the_average_over_random_orders():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (1, 12)).astype(float)
    targets = [[2, 7]]
    jittered = [recall_at_k(scores + rng.uniform(0, 0.5, scores.shape), targets, (1, 3, 5)) for _ in range(4000)]
    expected = {k: np.mean([recall[k] for recall in jittered]) for k in (1, 3, 5)}
    assert recall_at_k(scores, targets, (1, 3, 5)) == pytest.approx(expected, abs=0.03)


def test_rows_may_come_one_at_a_time():
    scores = np.random.default_rng(1).normal(size=(6, 9))
    assert recall_at_k(iter(scores), range(6)) == recall_at_k(scores, list(range(6)))


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.array([[np.nan, 0.0]]), [0], "NaN"),
        (np.array([[1.0, 0.0]]), [[]], "no right item"),
        (np.array([[1.0, 0.0]]), [0, 1], "longer"),
    ],
)
def test_nonsense_is_refused(scores, targets, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(scores, targets)
