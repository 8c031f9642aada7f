"""`retrieval`: how fast a gallery is encoded, and how fast candidate pairs are re-scored.

Axes: I items (images or clips), each with one text.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from scl_jax import build
from scl_jax.benchmark import workload
from scl_jax.evaluation.pretraining import PretrainingEvaluation
from scl_jax.training import sharding
from scl_jax.training.state import init_state


class RandomSet:
    """Stands for an `EvaluationSet`: one random batch, which comes again until all items are had."""

    def __init__(self, config: ConfigDict, stream: str, items: int, batch_size: int):
        self.num_items = self.num_captions = items
        self.caption_item = np.arange(items, dtype=np.int32)
        self._arrays = workload.random_arrays(config, stream, batch_size)
        self._batch_size = batch_size

    def items(self) -> Iterator[dict[str, Any]]:
        """Batches of pixels and weight."""
        return self._batches("pixels")

    def texts(self) -> Iterator[dict[str, Any]]:
        """Batches of token_ids, token_mask and weight."""
        return self._batches("token_ids", "token_mask")

    def _batches(self, *fields: str) -> Iterator[dict[str, Any]]:
        for start in range(0, self.num_items, self._batch_size):
            weight = (start + np.arange(self._batch_size) < self.num_items).astype(np.float32)
            yield {name: self._arrays[name] for name in fields} | {"weight": weight}


def measure(config: ConfigDict, stream: str, items: int, batch_size: int, rerank: int) -> dict[str, Any]:
    """Seconds and rates of retrieval over `items` random items with one text each; compilation is not counted."""
    rerank = min(rerank, items)
    config = workload.complete(config, stream, batch_size)
    mesh = sharding.make_mesh(**config.mesh)
    vocab_size = config.model.text.vocab_size
    task = build.pretraining(config, vocab_size, mask_id=vocab_size - 1)
    task = dataclasses.replace(task, masks=dataclasses.replace(task.masks, hard_negatives=0.0))
    graph, _, state = init_state(build.model_maker(config), build.optimizer_maker(config), mesh, config.seed)
    examples: Any = RandomSet(config, stream, items, batch_size)

    def seconds(rerank: int) -> tuple[float, float]:
        evaluation = PretrainingEvaluation(
            graph, task, mesh, {stream: examples}, batch_size=batch_size, rerank=rerank, seed=config.seed
        )
        evaluation.retrieval(state.params, stream, examples)  # compiles
        start = time.perf_counter()
        metrics = evaluation.retrieval(state.params, stream, examples).metrics
        pairs = next(value for name, value in metrics.items() if name.endswith("pairs_scored"))
        return time.perf_counter() - start, pairs

    encoding, _ = seconds(0)
    both, pairs = seconds(rerank)
    return {
        "items": items,
        "batch": batch_size,
        "rerank": rerank,
        "seconds_to_encode_and_compare": encoding,
        "items_per_second": items / encoding,
        "pairs": pairs,
        "pairs_per_second": pairs / max(both - encoding, 1e-9),
    }
