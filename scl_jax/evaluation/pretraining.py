"""What a pre-trained model can do without fine-tuning: matching and masked-language accuracy, zero-shot retrieval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from scl_jax.data.pipeline import EvaluationSet
from scl_jax.evaluation.gallery import queued
from scl_jax.evaluation.ranking import Ranking
from scl_jax.evaluation.retrieval import RetrievalEvaluation
from scl_jax.models import parameters
from scl_jax.models.parameters import Params
from scl_jax.objectives.masks import named_key
from scl_jax.partition import on_mesh
from scl_jax.tasks.pretrain import Pretraining
from scl_jax.training.sharding import global_batch
from scl_jax.types import Batch, LossSum


class PretrainingEvaluation(RetrievalEvaluation):
    """Zero-shot retrieval with the matching head, and the accuracies of both heads.

    Args:
        options: of `RetrievalEvaluation`.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        task: Pretraining,
        mesh: Mesh,
        sets: Mapping[str, EvaluationSet],
        *,
        seed: int,
        **options: Any,
    ):
        super().__init__(graph, mesh, sets, head="matching", **options)
        # accuracy is told on evenly drawn negatives, whatever training uses, so that runs compare
        task = dataclasses.replace(task, masks=dataclasses.replace(task.masks, hard_negatives=0.0))
        self._key = named_key(jax.random.key(seed), "evaluation")

        def accuracies(params: Params, batch: Batch, key) -> dict[str, LossSum]:
            masks = task.draw_masks(batch, key)
            model = parameters.merge(graph, params)
            return task.features(model, batch, masks, ("matching", "masked_language"), None).accuracies

        self._accuracies = jax.jit(on_mesh(mesh, accuracies))

    def __call__(self, params: Params) -> tuple[dict[str, float], dict[str, Ranking]]:
        """Flat metrics as in results.json, and the ranking of each stream."""
        metrics: dict[str, float] = {}
        for stream, examples in self.sets.items():
            middle = "" if stream == "images" else "video/"
            for name, value in self.accuracy(params, examples).items():
                metrics[f"{name}/{middle}accuracy"] = value
        retrieval, rankings = super().__call__(params)
        return metrics | retrieval, rankings

    def accuracy(self, params: Params, examples: EvaluationSet) -> dict[str, float]:
        """Accuracy of matching and masked language modelling, the same masks at every call."""

        def run(numbered: tuple[int, dict[str, Any]]) -> dict[str, LossSum]:
            index, arrays = numbered
            batch = Batch(**global_batch(arrays, self._mesh))
            return self._accuracies(params, batch, jax.random.fold_in(self._key, index))

        first, *others = queued(enumerate(examples.pairs()), run)
        totals = dict(first)
        for sums in others:
            totals = {name: total + sums[name] for name, total in totals.items()}
        return {name: float(value.mean()) for name, value in totals.items()}
