"""Visual questions, statements about two images, entailment: scores on a split, and the predictions.

Axes: B batch, K classes, N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from scl_jax.data.task_pipeline import TaskEvaluationSet
from scl_jax.data.vqa_answers import handed_in, vqa_score
from scl_jax.evaluation.gallery import queued
from scl_jax.models import parameters
from scl_jax.models.parameters import Params
from scl_jax.partition import on_mesh
from scl_jax.tasks.task import ClassifierTask
from scl_jax.training.sharding import global_batch, whole
from scl_jax.types import FIELDS, Batch


class Predictions(NamedTuple):
    """The most probable class of every example, by the owner's ids."""

    ids: list[str]
    classes: list[str]  # in words


class Targets(NamedTuple):
    """What is kept of the soft targets (B, K) of a batch, whose K are too many to keep them all."""

    of_chosen: Any  # (B,), what the chosen answer scores
    best: Any  # (B,), of every question
    total: Any  # (K,), over the questions of the batch


class ClassificationEvaluation:
    """Evaluates parameters on the sets of each stream; compiled functions are kept between calls.

    Args:
        sets: by stream name, "images" or "videos".
        classes: what the head tells apart, in its order.
        progress: is told (what, examples done, examples in all).

    Raises:
        ValueError: a set whose classes are others.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        task: ClassifierTask,
        mesh: Mesh,
        sets: Mapping[str, TaskEvaluationSet],
        *,
        classes: tuple[str, ...],
        progress: Callable[[str, int, int], None] | None = None,
    ):
        for stream, examples in sets.items():
            if examples.classes != classes:
                raise ValueError(
                    f"the {stream} that are evaluated have {len(examples.classes)} classes and not the {len(classes)} "
                    "of training, in their order: evaluate on the data set that was trained on"
                )
        self.sets = sets
        self._task, self._mesh, self._progress = task, mesh, progress
        self._words = tuple(map(handed_in, classes))

        def choose(params: Params, batch: Batch) -> tuple[Int[Array, " B"], Int[Array, " B"] | Targets | None]:
            chosen = jnp.argmax(task.logits(parameters.merge(graph, params), batch), axis=-1)
            if batch.answer_scores is None:
                return chosen, batch.label
            scores = jnp.where(batch.weight[:, None] > 0, batch.answer_scores, 0)
            of_chosen = jnp.take_along_axis(scores, chosen[:, None], axis=1)[:, 0]
            return chosen, Targets(of_chosen, scores.max(axis=1), scores.sum(axis=0))

        self._choose = jax.jit(on_mesh(mesh, choose))

    def __call__(self, params: Params) -> tuple[dict[str, float], dict[str, Predictions]]:
        """Flat metrics as in results.json, and the predictions of each stream."""
        metrics: dict[str, float] = {}
        predictions: dict[str, Predictions] = {}
        for stream, examples in self.sets.items():
            chosen, targets = self._choices(params, stream, examples)
            prefix = f"{self._task.loss}/" if stream == "images" else f"{self._task.loss}/video/"
            found = self._scores(chosen, targets, examples)
            metrics |= {f"{prefix}{name}": value for name, value in found.items()}
            ids = [examples.text_id(example) for example in range(examples.num_examples)]
            predictions[stream] = Predictions(ids, [self._words[label] for label in chosen])
        return metrics, predictions

    def _choices(
        self, params: Params, stream: str, examples: TaskEvaluationSet
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"] | Targets | None]:
        """The class chosen for every example, and the targets where there are: labels (N,), or what scores tell."""
        done = 0

        def run(arrays: dict[str, Any]) -> tuple[Any, Any, Any]:
            nonlocal done
            batch = Batch(**global_batch({name: arrays[name] for name in FIELDS if name in arrays}, self._mesh))
            done = min(done + batch.weight.shape[0], examples.num_examples)
            if self._progress is not None:
                self._progress(f"{self._task.loss}, {stream}", done, examples.num_examples)
            return *self._choose(params, batch), batch.weight

        results = [whole(result) for result in list(queued(examples.batches(), run))]
        real = np.concatenate([weight for _, _, weight in results]) > 0
        chosen = np.concatenate([choice for choice, _, _ in results])[real]
        parts = [targets for _, targets, _ in results if targets is not None]
        if not parts:
            return chosen, None
        if not isinstance(parts[0], Targets):
            return chosen, np.concatenate(parts)[real]
        of_chosen, best, totals = zip(*parts, strict=True)
        total = np.sum(totals, axis=0, dtype=np.float64)
        return chosen, Targets(np.concatenate(of_chosen)[real], np.concatenate(best)[real], total)

    def _scores(
        self,
        chosen: Int[np.ndarray, " N"],
        targets: Int[np.ndarray, " N"] | Targets | None,
        examples: TaskEvaluationSet,
    ) -> dict[str, float]:
        """Metrics of a stream; only the number of examples where their targets are not published."""
        numbers: dict[str, float] = {"examples": len(chosen)}
        if targets is None:
            return numbers
        if isinstance(targets, Targets):
            return numbers | self._answer_scores(chosen, targets, examples)
        known = targets >= 0
        if not known.any():
            return numbers
        labels = targets[known]
        majority = np.bincount(labels, minlength=len(self._words)).max() / len(labels)
        return {"accuracy": float((chosen[known] == labels).mean()), "majority": float(majority), **numbers}

    def _answer_scores(
        self, chosen: Int[np.ndarray, " N"], targets: Targets, examples: TaskEvaluationSet
    ) -> dict[str, float]:
        """VQA's official score from the people's answers, or from the soft targets where only these are known."""
        people = [examples.answers(example) for example in range(len(chosen))]
        answerable = targets.best > 0
        if all(people):
            given = [vqa_score(self._words[label], ten) for label, ten in zip(chosen, people, strict=True)]
        elif answerable.any():
            given = targets.of_chosen
        else:
            return {}
        return {
            "score": float(np.mean(given)),
            "majority": float(targets.total.max() / len(chosen)),  # always the one answer that scores best
            "in_vocabulary": float(answerable.mean()),  # questions that the vocabulary can answer at all
        }
