"""Retrieval in two stages: contrastive similarity over everything, then the fusion encoder over the best candidates.

Scoring every pair with the fusion encoder costs queries × items passes. Here each text and each item (image or clip)
is encoded once, the cosine of their contrastive features picks the `rerank` best candidates of each query, and only
those pairs go through `score_pairs`. A text belongs to one item; an item may have several texts.

Axes: T texts, I items, D width of the contrastive space, K candidates a query, N pairs.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scl_jax.evaluation.metrics import places

KS = (1, 5, 10)
NORM_EPSILON = 1e-8

PairScorer = Callable[[Int[np.ndarray, " N"], Int[np.ndarray, " N"]], Float[Array | np.ndarray, " N"]]
"""(text ids, item ids) → the matching head's log-odds that they are a pair: logit "pair" minus logit "no pair"."""

Progress = Callable[[int, int], None]
"""(pairs scored, pairs in all), after every batch."""


class Top(NamedTuple):
    """The best answers of every query (Q queries, best first): their ids and scores."""

    ids: Int[np.ndarray, "Q K"]
    scores: Float[np.ndarray, "Q K"]


class Ranking(NamedTuple):
    """What `rank` returns: flat metrics, the ten best answers of every query both ways, seconds spent on pairs."""

    metrics: dict[str, float]
    text_to_item: Top
    item_to_text: Top
    seconds: float


def rank(
    text_features: Float[Array | np.ndarray, "T D"],
    item_features: Float[Array | np.ndarray, "I D"],
    text_items: Int[np.ndarray, " T"],
    *,
    score_pairs: PairScorer | None = None,
    rerank: int = 128,
    all_pairs: bool = False,
    temperature: float = 0.07,
    combine: Literal["sum", "matching"] = "sum",
    batch_size: int = 256,
    item: Literal["image", "video"] = "image",
    captions: Sequence[str] | None = None,
    weights: Sequence[float] = (1.0,),
    progress: Progress | None = None,
) -> Ranking:
    """Text → item and item → text retrieval over one gallery.

    Args:
        text_features, item_features: contrastive features, normalised here.
        text_items: the item that each text describes; every item needs a text.
        score_pairs: the matching head, see `PairScorer`; called with exactly `batch_size` ids each time.
        rerank: candidates of a query that it re-scores; 0: contrastive similarity alone decides.
        all_pairs: re-score every pair instead: queries × items passes.
        temperature: of the contrastive softmax.
        combine: candidates are ordered by weight · log P(pair) + similarity / temperature ("sum"), or by log P(pair)
            ("matching").
        batch_size: pairs a call of `score_pairs`; the last batch is padded.
        item: names the metrics; those of videos go under `retrieval/video/`.
        captions: what the texts say: equal ones then find one another's items. Published recalls count a text's own
            item only, which is the default.
        weights: of log P(pair) in "sum"; of several, the `clearly_best`, which the metrics tell.
        progress: is told how many pairs are scored.

    Returns:
        Metrics such as `retrieval/text_to_image/recall@1`, `retrieval/mean_recall`, their contrastive-only
        counterparts under `retrieval/contrastive/`, and the number of pairs scored.

    Raises:
        ValueError: an item without a text, a text of an unknown item, or a score that is not a number.
    """
    text_items = np.asarray(text_items, int)
    item_texts = _texts_of_items(text_items, len(item_features))
    right_items, right_texts = _right_answers(text_items, item_texts, captions)
    similarity = contrastive_scores(text_features, item_features)  # (T, I)
    candidates, odds, pairs_scored = (None, None), (None, None), 0
    start = time.perf_counter()
    if score_pairs is not None and all_pairs:
        texts, items = similarity.shape
        every = _score_every_pair(texts, items, score_pairs, batch_size, progress)
        odds, pairs_scored = (every, every.T), every.size
    elif score_pairs is not None and rerank > 0:
        candidates = (top_candidates(similarity, rerank), top_candidates(similarity.T, rerank))  # (T, K), (I, K)
        odds, pairs_scored = _score_candidates(*candidates, score_pairs, batch_size, progress)
    seconds = time.perf_counter() - start

    prefix = "retrieval/" if item == "image" else "retrieval/video/"
    contrastive_prefix = prefix.replace("retrieval/", "retrieval/contrastive/")
    ways = (
        (f"text_to_{item}", similarity, right_items, candidates[0], odds[0]),
        (f"{item}_to_text", similarity.T, right_texts, candidates[1], odds[1]),
    )

    def final(way: int, weight: float) -> Iterator[Float[np.ndarray, " I"]]:
        _, scores, _, chosen, chosen_odds = ways[way]
        return _final_rows(scores, chosen, chosen_odds, temperature, combine, weight)

    def combined(weight: float) -> dict[str, float]:
        return _metrics(prefix, {name: (final(i, weight), ways[i][2]) for i, (name, *_) in enumerate(ways)})

    weighed = combine == "sum" and odds[0] is not None
    by_weight = {weight: combined(weight) for weight in (weights if weighed else (1.0,))}
    means = {weight: metrics[f"{prefix}mean_recall"] for weight, metrics in by_weight.items()}
    weight = clearly_best(means, queries=len(text_items) + len(item_texts))
    metrics = _metrics(contrastive_prefix, {name: (scores, right) for name, scores, right, *_ in ways})
    metrics |= by_weight[weight]
    metrics |= {f"{prefix}pairs_scored": pairs_scored, f"{prefix}texts": len(text_items)}
    metrics[f"{prefix}items"] = len(item_texts)
    if combine == "sum":
        metrics[f"{prefix}matching_weight"] = weight
    return Ranking(metrics, _top_of_rows(final(0, weight), max(KS)), _top_of_rows(final(1, weight), max(KS)), seconds)


def clearly_best(mean_recalls: Mapping[float, float], queries: int) -> float:
    """The smallest weight whose mean recall lies within one standard error of the best (Breiman et al., CART, 1984).

    A matching head that does not clearly help gets no weight: what it gains on these queries, others may not show.
    """
    best = max(mean_recalls.values())
    error = (best * (1 - best) / queries) ** 0.5
    return min(weight for weight, recall in mean_recalls.items() if recall >= best - error)


def contrastive_scores(
    text_features: Float[Array | np.ndarray, "T D"],
    item_features: Float[Array | np.ndarray, "I D"],
    chunk: int = 4096,
) -> Float[np.ndarray, "T I"]:
    """Cosines of all texts and items, computed on the device `chunk` texts at a time and kept on the host."""
    items = _normalise(jnp.asarray(item_features, jnp.float32))
    similarity = np.empty((len(text_features), len(item_features)), np.float32)
    for start in range(0, len(text_features), chunk):
        texts = jnp.asarray(text_features[start : start + chunk], jnp.float32)
        similarity[start : start + chunk] = _cosines(texts, items)
    return similarity


def top_candidates(scores: Float[np.ndarray, "Q I"], k: int, chunk: int = 4096) -> Int[np.ndarray, "Q K"]:
    """The k items (all, where there are fewer) of highest score of every query, best first; lower ids first in ties."""
    k = min(k, scores.shape[1])
    chosen = np.empty((len(scores), k), int)
    for start in range(0, len(scores), chunk):
        chosen[start : start + chunk] = _top_k(jnp.asarray(scores[start : start + chunk]), k)
    return chosen


def score_in_batches(
    text_ids: Int[np.ndarray, " N"],
    item_ids: Int[np.ndarray, " N"],
    score_pairs: PairScorer,
    batch_size: int,
    progress: Progress | None = None,
) -> Float[np.ndarray, " N"]:
    """Scores pairs in batches of one size, so that `score_pairs` compiles once; the last is padded with pair (0, 0).

    Scores that are still being computed are read two batches later, so that the device never waits for the host.
    """
    scores = np.empty(len(text_ids))
    waiting: deque[tuple[int, int, Any]] = deque()

    def read() -> None:
        start, stop, batch = waiting.popleft()
        scores[start:stop] = np.asarray(batch)[: stop - start]
        if progress is not None:
            progress(stop, len(text_ids))

    for start in range(0, len(text_ids), batch_size):
        stop = min(start + batch_size, len(text_ids))
        padding = (0, batch_size - (stop - start))
        batch = score_pairs(np.pad(text_ids[start:stop], padding), np.pad(item_ids[start:stop], padding))
        waiting.append((start, stop, batch))
        if len(waiting) > 2:
            read()
    while waiting:
        read()
    return scores


def _texts_of_items(text_items: Int[np.ndarray, " T"], items: int) -> list[Int[np.ndarray, " R"]]:
    if text_items.size and not 0 <= text_items.min() <= text_items.max() < items:
        raise ValueError(
            f"text_items names items {text_items.min()} … {text_items.max()} but the gallery holds {items}"
        )
    order = np.argsort(text_items, kind="stable")
    texts = np.split(order, np.searchsorted(text_items[order], np.arange(1, items)))
    silent = [index for index, own in enumerate(texts) if own.size == 0]
    if silent:
        raise ValueError(
            f"{len(silent)} items have no text, the first is item {silent[0]}: leave them out of the gallery"
        )
    return texts


def _right_answers(
    text_items: Int[np.ndarray, " T"], item_texts: list[Int[np.ndarray, " R"]], captions: Sequence[str] | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The right items of every text and the right texts of every item."""
    if captions is None:
        return list(text_items[:, None]), item_texts
    alike: dict[str, list[int]] = defaultdict(list)
    for text, caption in enumerate(captions):
        alike[str(caption)].append(text)
    right_items = [np.unique(text_items[alike[str(caption)]]) for caption in captions]
    right_texts = [np.unique(np.concatenate([alike[str(captions[text])] for text in own])) for own in item_texts]
    return right_items, right_texts


def _score_candidates(
    text_candidates: Int[np.ndarray, "T K"],
    item_candidates: Int[np.ndarray, "I M"],
    score_pairs: PairScorer,
    batch_size: int,
    progress: Progress | None,
) -> tuple[tuple[Float[np.ndarray, "T K"], Float[np.ndarray, "I M"]], int]:
    """Log-odds of the candidates both ways, and how many pairs were scored: a pair wanted both ways counts once."""
    items = len(item_candidates)
    forward = (
        np.arange(len(text_candidates))[:, None] * items + text_candidates
    )  # text · items + item: one pair's number
    backward = item_candidates * items + np.arange(items)[:, None]
    pairs = np.unique(np.concatenate([forward.ravel(), backward.ravel()]))
    odds = score_in_batches(pairs // items, pairs % items, score_pairs, batch_size, progress)
    return (odds[np.searchsorted(pairs, forward)], odds[np.searchsorted(pairs, backward)]), len(pairs)


def _score_every_pair(
    texts: int, items: int, score_pairs: PairScorer, batch_size: int, progress: Progress | None
) -> Float[np.ndarray, "T I"]:
    """Log-odds of all pairs, so many texts at a time that their pairs fill whole batches."""
    odds = np.empty((texts, items), np.float32)
    step = math.lcm(batch_size, items) // items * max(1, 2**20 // math.lcm(batch_size, items))
    for first in range(0, texts, step):
        rows = np.arange(first, min(first + step, texts))

        def told(done: int, _: int, before: int = first * items) -> None:
            if progress is not None:
                progress(before + done, texts * items)

        ids = np.repeat(rows, items), np.tile(np.arange(items), len(rows))
        odds[rows] = score_in_batches(*ids, score_pairs, batch_size, told).reshape(len(rows), items)
    return odds


def _final_rows(
    similarity: Float[np.ndarray, "Q I"],
    candidates: Int[np.ndarray, "Q K"] | None,
    odds: Float[np.ndarray, "Q K"] | None,
    temperature: float,
    combine: str,
    weight: float,
) -> Iterator[Float[np.ndarray, " I"]]:
    """Yields each query's final scores: the candidates re-scored, all others below them in contrastive order.

    Without `candidates`, `odds` are those of all items.
    """
    for query, cosines in enumerate(similarity):
        scores = cosines.astype(np.float64) / temperature
        if odds is not None:
            chosen = slice(None) if candidates is None else candidates[query]
            final = -np.logaddexp(0.0, -odds[query])  # log P(pair) = log sigmoid(odds)
            if combine == "sum":
                final = weight * final + scores[chosen]
            scores += final.min() - scores.max() - 1.0  # the rest: same order, all below the candidates
            scores[chosen] = final
        yield scores


def _metrics(prefix: str, ways: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """Recalls and median rank of each way (scores, right answers), and the mean of the recalls."""
    metrics: dict[str, float] = {}
    for name, (scores, right) in ways.items():
        metrics |= _direction_metrics(f"{prefix}{name}", scores, right)
    recalls = [metrics[f"{prefix}{name}/recall@{k}"] for name in ways for k in KS]
    return metrics | {f"{prefix}mean_recall": float(np.mean(recalls))}


def _direction_metrics(prefix: str, scores, targets) -> dict[str, float]:
    found = places(scores, targets)
    metrics = {f"{prefix}/recall@{k}": float(np.mean([where.hit_probability(k) for where in found])) for k in KS}
    return metrics | {f"{prefix}/median_rank": float(np.median([where.expected_rank() for where in found]))}


def _top_of_rows(rows: Iterator[Float[np.ndarray, " I"]], k: int) -> Top:
    tops = [(order := np.argsort(-row, kind="stable")[:k], row[order]) for row in rows]
    return Top(np.stack([ids for ids, _ in tops]), np.stack([scores for _, scores in tops]))


def _normalise(features: Float[Array, "Q D"]) -> Float[Array, "Q D"]:
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), NORM_EPSILON)


@jax.jit
def _cosines(texts: Float[Array, "T D"], items: Float[Array, "I D"]) -> Float[Array, "T I"]:
    return jnp.matmul(_normalise(texts), items.T, precision="highest")  # TF32 or bf16 would reorder near ties


@partial(jax.jit, static_argnums=1)
def _top_k(scores: Float[Array, "Q I"], k: int) -> Int[Array, "Q K"]:
    return jax.lax.top_k(scores, k)[1]
