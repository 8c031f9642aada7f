"""Retrieval by a whole model: every text and every item encoded once, the best candidates re-scored in pairs.

Axes: B batch, N visual tokens, L text tokens, D fusion width, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

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
from scl_jax.models.scl import SCL
from scl_jax.partition import on_mesh
from scl_jax.training.sharding import global_batch, split_rows, whole

Head = Literal["matching", "rank"]


class RetrievalEvaluation:
    """Evaluates parameters on the sets of each stream; compiled functions and captions are kept between calls.

    Args:
        sets: by stream name, "images" or "videos".
        head: what re-scores pairs: the matching head, together with the contrastive similarity (zero-shot), or the
            rank head of fine-tuning alone.
        rerank: candidates of a query that are re-scored; 0: contrastive similarity only.
        all_pairs: re-score every pair instead.
        equal_captions: whether a caption finds every item that has it, not its own alone.
        weights: of log P(pair) of the matching head beside the similarity; of several, the best of a set is taken.
        progress: is told (what, pairs scored, pairs in all).
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        mesh: Mesh,
        sets: Mapping[str, EvaluationSet],
        *,
        head: Head,
        batch_size: int,
        rerank: int,
        all_pairs: bool = False,
        equal_captions: bool = False,
        weights: Sequence[float] = (1.0,),
        progress: Callable[[str, int, int], None] | None = None,
    ):
        self.sets = sets
        self._mesh, self._head, self._progress = mesh, head, progress
        self._batch_size, self._rerank = batch_size, rerank
        self._all_pairs, self._equal_captions = all_pairs, equal_captions
        self._weights = {stream: tuple(weights) for stream in sets}

        def encode_items(params: Params, pixels) -> tuple[Float[Array, "B E"], Float[Array, "B N D"]]:
            model = parameters.merge(graph, params)
            tokens = model.encode_image(pixels)
            return unit(model.project_image(tokens, pixels.shape[1])), tokens

        def encode_texts(params: Params, token_ids, token_mask) -> tuple[Float[Array, "B E"], Float[Array, "B L D"]]:
            model = parameters.merge(graph, params)
            tokens = model.encode_text(token_ids, token_mask)
            return unit(model.project_text(tokens)), tokens

        def score(params: Params, texts, masks, items, frames: int) -> Float[Array, " B"]:
            model = parameters.merge(graph, params)
            return pair_scores(model, head, model.joint(texts, masks, items, frames))

        self._encode_items = jax.jit(on_mesh(mesh, encode_items))
        self._encode_texts = jax.jit(on_mesh(mesh, encode_texts))
        self._score = jax.jit(on_mesh(mesh, score), static_argnums=4)

    def __call__(self, params: Params) -> tuple[dict[str, float], dict[str, Ranking]]:
        """Flat metrics as in results.json, and the ranking of each stream."""
        metrics: dict[str, float] = {}
        rankings: dict[str, Ranking] = {}
        for stream, examples in self.sets.items():
            rankings[stream] = self.retrieval(params, stream, examples)
            metrics |= rankings[stream].metrics
            metrics[f"speed/retrieval_{stream}_seconds"] = rankings[stream].seconds
        means = [metrics[f"retrieval/{m}mean_recall"] for m in ("", "video/") if f"retrieval/{m}mean_recall" in metrics]
        metrics["retrieval/mean_recall_of_streams"] = float(np.mean(means))
        return metrics, rankings

    def fix_weights(self, params: Params, held_out: RetrievalEvaluation) -> None:
        """Takes the weights of the matching head that are best on other sets than those evaluated here."""
        for stream, examples in held_out.sets.items():
            metrics = held_out.retrieval(params, stream, examples).metrics
            middle = "" if stream == "images" else "video/"
            self._weights[stream] = (metrics[f"retrieval/{middle}matching_weight"],)

    def retrieval(self, params: Params, stream: str, examples: EvaluationSet) -> Ranking:
        """Every text and every item encoded once, the best candidates re-scored in pairs."""
        item_features, item_tokens = self._encode(params, examples.items(), ("pixels",), self._encode_items)
        text_features, text_tokens, text_masks = self._encode(
            params, examples.texts(), ("token_ids", "token_mask"), self._encode_texts, also="token_mask"
        )
        frames = next(iter(examples.items()))["pixels"].shape[1]

        def score(text_ids: Int[np.ndarray, " B"], item_ids: Int[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
            pairs = (text_tokens[text_ids], text_masks[text_ids], item_tokens[item_ids])
            return whole(self._score(params, *split_rows(pairs, self._mesh), frames)).astype(np.float32)

        def told(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(f"retrieval, pairs of {stream}", done, total)

        return rank(
            text_features,
            item_features,
            examples.caption_item,
            score_pairs=score if self._rerank or self._all_pairs else None,
            rerank=self._rerank,
            all_pairs=self._all_pairs,
            combine="sum" if self._head == "matching" else "matching",
            temperature=float(params["contrastive"]["temperature"]),
            batch_size=self._batch_size,
            item="image" if stream == "images" else "video",
            captions=examples.captions if self._equal_captions else None,
            weights=self._weights[stream],
            progress=told,
        )

    def _encode(
        self, params: Params, batches, fields: tuple[str, ...], encode: Any, also: str = ""
    ) -> list[np.ndarray]:
        """All rows of weight 1 of what `encode` gives for the named fields (and the field `also` itself)."""
        parts: list[tuple[np.ndarray, ...]] = []
        for arrays in batches:
            batch = global_batch(
                {name: arrays[name] for name in (*fields, "weight", *([also] if also else []))}, self._mesh
            )
            outputs = encode(params, *(batch[field] for field in fields))
            extra = (batch[also],) if also else ()
            weight, *columns = whole((batch["weight"], *outputs, *extra))
            parts.append(tuple(x[weight > 0] for x in columns))
        return [np.concatenate(column) for column in zip(*parts, strict=True)]


def pair_scores(model: SCL, head: Head, joint: Float[Array, "B J"]) -> Float[Array, " B"]:
    """What a head says of pairs, in at least float32: log-odds of the matching head, or the score of the rank head."""
    logits = model.rank(joint) if head == "rank" else model.matching(joint)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits[:, 0] if head == "rank" else logits[:, 1] - logits[:, 0]
