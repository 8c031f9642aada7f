"""What re-scoring the best candidates costs and loses against re-scoring every pair: `python benchmarks/rerank.py`.

A synthetic gallery: every item is a random unit vector, its texts are noisy copies. The contrastive features are noisy
versions of both; the pair score is nearer to the truth, as a fusion encoder's is. Its value is planted, its cost is
real: each pair goes through a small fusion encoder, in the code that evaluations use (evaluation/ranking.py).
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import Progress

from scl_jax.evaluation.ranking import KS, PairScorer, Ranking, rank
from scl_jax.models import parameters
from scl_jax.models.fusion import FusionConfig, FusionEncoder
from scl_jax.models.layers import Precision

DIMENSIONS = 32  # of the truth
TEXT_TOKENS, IMAGE_TOKENS = 8, 5


def gallery(options: Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Contrastive features of texts and items, the item of every text, and the planted score of every pair."""
    rng = np.random.default_rng(options.seed)
    text_items = np.arange(options.texts) % options.items
    items = unit(rng.normal(size=(options.items, DIMENSIONS)))
    texts = unit(items[text_items] + noise(rng, options.texts, 0.6))
    planted = 10 * texts @ items.T + rng.normal(0, 0.5, (options.texts, options.items))
    return (
        unit(texts + noise(rng, options.texts, 0.6)).astype(np.float32),
        unit(items + noise(rng, options.items, 0.6)).astype(np.float32),
        text_items,
        planted.astype(np.float32),
    )


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def noise(rng: np.random.Generator, rows: int, length: float) -> np.ndarray:
    """Random rows of about this length."""
    return rng.normal(0, length / np.sqrt(DIMENSIONS), (rows, DIMENSIONS))


def fusion_scorer(options: Namespace, planted: np.ndarray) -> PairScorer:
    """Runs every pair through a fusion encoder of random weights, and answers with the planted score."""
    sizes = FusionConfig(width=options.width, layers=options.layers, heads=2, mlp_width=4 * options.width)
    encoder = FusionEncoder(sizes, options.width, options.width, Precision(), nnx.Rngs(0))
    graph, params = parameters.split(encoder)
    rng = np.random.default_rng(0)
    text_tokens = rng.normal(size=(options.texts, TEXT_TOKENS, options.width)).astype(np.float32)
    item_tokens = rng.normal(size=(options.items, IMAGE_TOKENS, options.width)).astype(np.float32)
    mask = jnp.ones((options.batch, TEXT_TOKENS), bool)

    @jax.jit
    def joint(params, texts, items):
        encoder = parameters.merge(graph, params)
        return encoder.joint(encoder(texts, mask, items, 1)).sum(axis=1)

    def score(text_ids, item_ids):
        jax.block_until_ready(joint(params, text_tokens[text_ids], item_tokens[item_ids]))
        return planted[text_ids, item_ids]

    score(np.zeros(options.batch, int), np.zeros(options.batch, int))  # compile before the clock runs
    return score


def timed(what: str, options: Namespace, features: tuple, score: PairScorer, **more) -> tuple[Ranking, float]:
    """A ranking, and its seconds from features to recall."""
    with Progress() as bars:
        bar = bars.add_task(what)

        def told(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        start = time.perf_counter()
        ranking = rank(
            *features, score_pairs=score, combine="matching", batch_size=options.batch, progress=told, **more
        )
        return ranking, time.perf_counter() - start


def main() -> None:
    """Prints both, and what lies between."""
    parser = ArgumentParser(description="Top-k re-ranking against all pairs.")
    for name, default in (("items", 1000), ("texts", 5000), ("rerank", 128), ("batch", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("width", 16), ("layers", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    *features, planted = gallery(options)
    score = fusion_scorer(options, planted)
    runs = {
        f"top {options.rerank}": timed("candidates", options, tuple(features), score, rerank=options.rerank),
        "all pairs": timed("all pairs", options, tuple(features), score, all_pairs=True),
    }
    print(f"{options.items:,} items × {options.texts:,} texts, fusion width {options.width}, {options.layers} layer(s)")
    for name, (ranking, seconds) in runs.items():
        m = ranking.metrics
        print(f"{name}: {m['retrieval/pairs_scored']:,} pairs in {ranking.seconds:.1f} s, {seconds:.1f} s in all")
        for direction in ("text_to_image", "image_to_text"):
            recalls = ", ".join(f"@{k} {100 * m[f'retrieval/{direction}/recall@{k}']:.2f}" for k in KS)
            contrastive = 100 * m[f"retrieval/contrastive/{direction}/recall@1"]
            print(f"  {direction}: recall {recalls}  (contrastive alone @1 {contrastive:.2f})")
    few, every = (ranking for ranking, _ in runs.values())
    ratio = every.metrics["retrieval/pairs_scored"] / few.metrics["retrieval/pairs_scored"]
    worst = max(
        abs(every.metrics[name] - few.metrics[name])
        for name in every.metrics
        if "recall@" in name and "contrastive" not in name
    )
    print(f"all pairs: {ratio:.2f} × the pairs, {every.seconds / few.seconds:.2f} × the seconds of scoring")
    print(f"largest difference of a recall: {100 * worst:.2f} points")


if __name__ == "__main__":
    main()
