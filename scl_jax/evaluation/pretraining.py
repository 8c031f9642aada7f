"""What a pre-trained model can do without fine-tuning: matching and masked-language accuracy, zero-shot retrieval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from scl_jax.data.pipeline import EvaluationSet
from scl_jax.evaluation.ranking import Ranking, rank
from scl_jax.models import parameters
from scl_jax.models.heads import unit
from scl_jax.models.parameters import Params
from scl_jax.objectives.views import named_key
from scl_jax.partition import on_mesh
from scl_jax.tasks.pretrain import Pretraining
from scl_jax.training.sharding import global_batch
from scl_jax.types import Batch, LossSum


class PretrainingEvaluation:
    """Evaluates parameters on the sets of each stream; compiled functions and captions are kept between calls.

    Args:
        sets: by stream name, "images" or "videos".
        rerank: candidates of a query that the matching head re-scores; 0: contrastive similarity only.
        equal_captions: whether a caption finds every item that has it, not its own alone.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        task: Pretraining,
        mesh: Mesh,
        sets: Mapping[str, EvaluationSet],
        *,
        batch_size: int,
        rerank: int,
        seed: int,
        equal_captions: bool = False,
    ):
        self.sets = sets
        self._mesh = mesh
        self._batch_size, self._rerank, self._equal_captions = batch_size, rerank, equal_captions
        # accuracy is told on evenly drawn negatives, whatever training uses, so that runs compare
        task = dataclasses.replace(task, masks=dataclasses.replace(task.masks, hard_negatives=0.0))
        self._key = named_key(jax.random.key(seed), "evaluation")

        def encode_items(params: Params, pixels) -> tuple[Float[Array, "B E"], Float[Array, "B N D"]]:
            model = parameters.merge(graph, params)
            tokens = model.encode_image(pixels)
            return unit(model.project_image(tokens, pixels.shape[1])), tokens

        def encode_texts(params: Params, token_ids, token_mask) -> tuple[Float[Array, "B E"], Float[Array, "B L D"]]:
            model = parameters.merge(graph, params)
            tokens = model.encode_text(token_ids, token_mask)
            return unit(model.project_text(tokens)), tokens

        def log_odds(params: Params, texts, masks, items, frames: int) -> Float[Array, " B"]:
            model = parameters.merge(graph, params)
            logits = model.matching(model.fusion.joint(model.fuse(texts, masks, items, frames)))
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            return logits[:, 1] - logits[:, 0]

        def accuracies(params: Params, batch: Batch, key) -> dict[str, LossSum]:
            masks = task.draw_masks(batch, key)
            model = parameters.merge(graph, params)
            return task.features(model, batch, masks, ("matching", "masked_language"), None).accuracies

        self._encode_items = jax.jit(on_mesh(mesh, encode_items))
        self._encode_texts = jax.jit(on_mesh(mesh, encode_texts))
        self._log_odds = jax.jit(on_mesh(mesh, log_odds), static_argnums=4)
        self._accuracies = jax.jit(on_mesh(mesh, accuracies))

    def __call__(self, params: Params) -> tuple[dict[str, float], dict[str, Ranking]]:
        """Flat metrics as in results.json, and the ranking of each stream."""
        metrics: dict[str, float] = {}
        rankings: dict[str, Ranking] = {}
        for stream, examples in self.sets.items():
            middle = "" if stream == "images" else "video/"
            for name, value in self.accuracy(params, examples).items():
                metrics[f"{name}/{middle}accuracy"] = value
            rankings[stream] = self.retrieval(params, stream, examples)
            metrics |= rankings[stream].metrics
        means = [metrics[f"retrieval/{m}mean_recall"] for m in ("", "video/") if f"retrieval/{m}mean_recall" in metrics]
        metrics["retrieval/mean_recall_of_streams"] = float(np.mean(means))
        return metrics, rankings

    def accuracy(self, params: Params, examples: EvaluationSet) -> dict[str, float]:
        """Accuracy of matching and masked language modelling, the same masks at every call."""
        totals: dict[str, LossSum] = {}
        for index, arrays in enumerate(examples.pairs()):
            batch = Batch(**global_batch(arrays, self._mesh))
            sums = self._accuracies(params, batch, jax.random.fold_in(self._key, index))
            totals = {name: totals[name] + value if name in totals else value for name, value in sums.items()}
        return {name: float(value.mean()) for name, value in totals.items()}

    def retrieval(self, params: Params, stream: str, examples: EvaluationSet) -> Ranking:
        """Zero-shot retrieval: every text and every item encoded once, the best candidates re-scored in pairs."""
        item_features, item_tokens = self._encode(params, examples.items(), ("pixels",), self._encode_items)
        text_features, text_tokens, text_masks = self._encode(
            params, examples.texts(), ("token_ids", "token_mask"), self._encode_texts, also="token_mask"
        )
        frames = next(iter(examples.items()))["pixels"].shape[1]

        def score(text_ids: Int[np.ndarray, " B"], item_ids: Int[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
            pairs = (text_tokens[text_ids], text_masks[text_ids], item_tokens[item_ids])
            return np.asarray(self._log_odds(params, *global_batch(pairs, self._mesh), frames), np.float32)

        return rank(
            text_features,
            item_features,
            examples.caption_item,
            score_pairs=score if self._rerank else None,
            rerank=self._rerank,
            temperature=float(params["contrastive"]["temperature"]),
            batch_size=self._batch_size,
            item="image" if stream == "images" else "video",
            captions=examples.captions if self._equal_captions else None,
        )

    def _encode(
        self, params: Params, batches, fields: tuple[str, ...], encode: Any, also: str = ""
    ) -> list[np.ndarray]:
        """All rows of weight 1 of what `encode` gives for the named fields (and the field `also` itself)."""
        parts: list[tuple[np.ndarray, ...]] = []
        for arrays in batches:
            real = arrays["weight"] > 0
            outputs = encode(params, *(global_batch(arrays[field], self._mesh) for field in fields))
            extra = (arrays[also],) if also else ()
            parts.append(tuple(np.asarray(x)[real] for x in (*outputs, *extra)))
        return [np.concatenate(column) for column in zip(*parts, strict=True)]
