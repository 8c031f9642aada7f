"""Retrieval by a whole model: every text and every item encoded once, the best candidates re-scored in pairs.

Axes: B batch, R rows of a gallery, N visual tokens, L text tokens, D fusion width, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from scl_jax.data.pipeline import EvaluationSet
from scl_jax.evaluation.gallery import Rows, queued
from scl_jax.evaluation.ranking import PairScorer, Ranking, rank
from scl_jax.models import parameters
from scl_jax.models.heads import unit
from scl_jax.models.parameters import Params
from scl_jax.models.scl import SCL
from scl_jax.partition import on_mesh, split_batch
from scl_jax.training.sharding import global_batch, replicated, split_rows, whole

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

        def score_rows(params: Params, texts, items, text_ids, item_ids, frames: int) -> Float[Array, " B"]:
            (text, mask), item = (take(x, text_ids) for x in texts), take(items, item_ids)
            return score(params, text, mask, item, frames)

        def take(x: Shaped[Array, "R *axes"], rows: Int[Array, " B"]) -> Shaped[Array, "B *axes"]:
            return split_batch(jnp.take(x, rows, axis=0))

        self._encode_items = jax.jit(on_mesh(mesh, encode_items))
        self._encode_texts = jax.jit(on_mesh(mesh, encode_texts))
        answer = replicated(mesh)
        self._score = jax.jit(on_mesh(mesh, score), static_argnums=4, out_shardings=answer)
        self._score_rows = jax.jit(on_mesh(mesh, score_rows), static_argnums=5, out_shardings=answer)

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
        batches = iter(examples.items())
        first = next(batches)
        frames = first["pixels"].shape[1]
        items, item_rows = self._gallery(
            chain([first], batches), partial(self._item_columns, params), examples.num_items
        )
        texts, text_rows = self._gallery(examples.texts(), partial(self._text_columns, params), examples.num_captions)
        pairs = self._pair_scorer(params, frames, text_rows, item_rows)

        def told(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(f"retrieval, pairs of {stream}", done, total)

        return rank(
            texts,
            items,
            examples.caption_item,
            score_pairs=pairs if self._rerank or self._all_pairs else None,
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

    def _item_columns(self, params: Params, batch: dict[str, Array]) -> tuple[Array, ...]:
        """Features and tokens."""
        return self._encode_items(params, batch["pixels"])

    def _text_columns(self, params: Params, batch: dict[str, Array]) -> tuple[Array, ...]:
        """Features, tokens and masks."""
        return *self._encode_texts(params, batch["token_ids"], batch["token_mask"]), batch["token_mask"]

    def _gallery(
        self, batches: Iterable[dict[str, Any]], encode: Callable[[dict[str, Array]], Any], count: int
    ) -> tuple[Float[np.ndarray, "R E"], Rows]:
        """The contrastive features of all rows, and the rest of what `encode` gives for every batch, (B, …) each."""
        fields = ("pixels", "token_ids", "token_mask")
        chosen = ({name: arrays[name] for name in fields if name in arrays} for arrays in batches)
        features: list[Array] = []

        def others() -> Iterator[tuple[Array, ...]]:
            for first, *rest in queued(chosen, lambda arrays: encode(global_batch(arrays, self._mesh))):
                features.append(first)
                yield tuple(rest)

        rows = Rows(others(), count, self._mesh)
        return np.concatenate([whole(x) for x in features])[:count], rows

    def _pair_scorer(self, params: Params, frames: int, text_rows: Rows, item_rows: Rows) -> PairScorer:
        """The score of pairs by number."""

        def on_device(text_ids: Int[np.ndarray, " B"], item_ids: Int[np.ndarray, " B"]) -> Float[Array, " B"]:
            ids = split_rows((text_ids, item_ids), self._mesh)
            return self._score_rows(params, text_rows.arrays, item_rows.arrays[0], *ids, frames)

        if text_rows.on_device and item_rows.on_device:
            return on_device
        (tokens, masks), (visual,) = text_rows.on_host(), item_rows.on_host()

        def from_host(text_ids: Int[np.ndarray, " B"], item_ids: Int[np.ndarray, " B"]) -> Float[Array, " B"]:
            pairs = (tokens[text_ids], masks[text_ids], visual[item_ids])
            return self._score(params, *split_rows(pairs, self._mesh), frames)

        return from_host


def pair_scores(model: SCL, head: Head, joint: Float[Array, "B J"]) -> Float[Array, " B"]:
    """What a head says of pairs, in at least float32: log-odds of the matching head, or the score of the rank head."""
    logits = model.rank(joint) if head == "rank" else model.matching(joint)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits[:, 0] if head == "rank" else logits[:, 1] - logits[:, 0]
