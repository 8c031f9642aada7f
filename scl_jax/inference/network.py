"""The compiled functions of a trained model, run on batches of few sizes so that little is compiled.

Axes: B batch, F frames, L text tokens, N visual tokens (F [CLS] first, then patches), D fusion width, E contrastive
width, V vocabulary, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from scl_jax.models import parameters
from scl_jax.models.fusion import IMAGE_TYPE, SECOND_IMAGE_TYPE, Wanted, global_tokens
from scl_jax.models.heads import unit
from scl_jax.models.parameters import Params

Tokens = Float[Array, "B L D"]
Mask = Bool[Array, "B L"]
Visual = Float[Array, "B N D"]


class MissingHeadError(ValueError):
    """The checkpoint was not trained for what is asked of it."""


class Network:
    """Calls compiled functions by name; rows run in batches of few sizes, padded where there are fewer.

    Args:
        graph, params: of the network, with the heads that the checkpoint has.
        heads: their names.
        batch_sizes: ascending; see `batches`.
    """

    def __init__(self, graph: nnx.GraphDef, params: Params, heads: tuple[str, ...], batch_sizes: tuple[int, ...]):
        self.heads, self.batch_sizes = heads, batch_sizes
        self._params = params
        encoders, on_pairs = (_texts, _media), (_match, _rank, _fill, _attend, _answer, _entail, _compare)
        self._compiled: dict[str, Any] = {
            function.__name__.lstrip("_"): jax.jit(partial(function, graph, heads), static_argnames=names)
            for functions, names in ((encoders, ()), (on_pairs, ("frames",)))
            for function in functions
        }

    def need(self, head: str, what: str) -> None:
        """Raises MissingHeadError, with what the checkpoint can do, unless it has that head."""
        if head not in self.heads:
            raise MissingHeadError(
                f"{what} needs the head {head!r}, which this checkpoint lacks; it has: {', '.join(self.heads)}. "
                "Load a checkpoint that was trained for it"
            )

    def compilations(self) -> dict[str, int]:
        """How often each function has been compiled so far."""
        return {name: function._cache_size() for name, function in self._compiled.items()}

    def __call__(self, name: str, *arrays: np.ndarray, outputs: int | None = None, **static: int) -> list[np.ndarray]:
        """The first `outputs` results of a function on all rows, on the host; tokens keep the type of activations."""
        parts, start = [], 0
        for count, size in batches(len(arrays[0]), self.batch_sizes):
            padded = [_pad(array[start : start + count], size) for array in arrays]
            results = self._compiled[name](self._params, *padded, **static)[:outputs]
            parts.append([np.asarray(result)[:count] for result in results])
            start += count
        return [np.concatenate(column) for column in zip(*parts, strict=True)]


def batches(rows: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(rows, size to pad them to) of each batch: the largest as often as it is filled, then the smallest that suffices.

    The rest goes in several batches of the next smaller size where these have at most half the rows: of the sizes 1, 8
    and 64, 9 rows are 8 and 1, not 64. Never one by one, since each call has a cost of its own.
    """
    while rows:
        size = next((size for size in sizes if size >= rows), sizes[-1])
        smaller = max((other for other in sizes if 1 < other < min(size, rows)), default=0)
        if smaller and 2 * smaller * -(-rows // smaller) <= size:
            size = smaller
        count = min(rows, size)
        yield count, size
        rows -= count


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
    """Repeats the last row up to `rows`."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)]) if len(array) < rows else array


def _wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Each function returns a tuple; `graph` and `heads` are bound when it is compiled.


def _texts(
    graph: nnx.GraphDef, heads: tuple[str, ...], params: Params, token_ids: Int[Array, "B L"], token_mask: Mask
) -> tuple[Float[Array, "B E"], Tokens]:
    """Unit vectors of the contrastive space (no columns without that head) and tokens for fusion."""
    model = parameters.merge(graph, params)
    tokens = model.encode_text(token_ids, token_mask)
    features = unit(model.project_text(tokens)) if "contrastive" in heads else jnp.zeros((len(tokens), 0))
    return features, tokens


def _media(
    graph: nnx.GraphDef, heads: tuple[str, ...], params: Params, pixels: UInt8[Array, "B F height width 3"]
) -> tuple[Float[Array, "B E"], Visual]:
    """The same of images or clips."""
    model = parameters.merge(graph, params)
    tokens = model.encode_image(pixels)
    frames = pixels.shape[1]
    features = unit(model.project_image(tokens, frames)) if "contrastive" in heads else jnp.zeros((len(tokens), 0))
    return features, tokens


def _joint(model: Any, text: Tokens, mask: Mask, media: Visual, frames: int, image_type: int = IMAGE_TYPE) -> Array:
    return model.joint(text, mask, media, frames, image_type=image_type)


def _match(graph, heads, params, text: Tokens, mask: Mask, media: Visual, *, frames: int) -> tuple[Array]:
    """Log-odds (B,) that text and image belong together."""
    model = parameters.merge(graph, params)
    logits = _wide(model.matching(_joint(model, text, mask, media, frames)))
    return (logits[:, 1] - logits[:, 0],)


def _rank(graph, heads, params, text: Tokens, mask: Mask, media: Visual, *, frames: int) -> tuple[Array]:
    """The score (B,) of a model fine-tuned for retrieval."""
    model = parameters.merge(graph, params)
    return (_wide(model.rank(_joint(model, text, mask, media, frames)))[:, 0],)


def _fill(graph, heads, params, text: Tokens, mask: Mask, media: Visual, position, *, frames: int) -> tuple[Array]:
    """Probabilities (B, V) of the token at `position` (B,)."""
    model = parameters.merge(graph, params)
    wanted = Wanted(position[:, None], global_tokens(len(text), frames).image)
    hidden = model.fuse(text, mask, media, frames, wanted=wanted).text[:, 0]
    return (jax.nn.softmax(_wide(model.masked_language(hidden)), axis=-1),)


def _attend(graph, heads, params, text: Tokens, mask: Mask, media: Visual, *, frames: int) -> tuple[Array]:
    """Text → patch weights (B, L, F·P) of the last fusion layer, maximum over heads."""
    model = parameters.merge(graph, params)
    maps = model.fusion.cross_attention_maps(text, mask, media)  # (B, H, L, N)
    return (maps[..., frames:].max(axis=1),)


def _answer(graph, heads, params, text: Tokens, mask: Mask, media: Visual, *, frames: int) -> tuple[Array]:
    """Probabilities (B, K) of the answers, each for itself."""
    model = parameters.merge(graph, params)
    return (jax.nn.sigmoid(_wide(model.vqa(_joint(model, text, mask, media, frames)))),)


def _entail(graph, heads, params, text: Tokens, mask: Mask, media: Visual, *, frames: int) -> tuple[Array]:
    """Probabilities (B, 3) of the three classes of visual entailment."""
    model = parameters.merge(graph, params)
    return (jax.nn.softmax(_wide(model.entailment(_joint(model, text, mask, media, frames))), axis=-1),)


def _compare(graph, heads, params, text: Tokens, mask: Mask, first: Visual, second: Visual, *, frames: int):
    """Probability (B,) that the statement is true of the two images (METHOD section 7, NLVR2)."""
    model = parameters.merge(graph, params)
    types = ((first, IMAGE_TYPE), (second, SECOND_IMAGE_TYPE))
    joints = [_joint(model, text, mask, image, frames, image_type) for image, image_type in types]
    logits = _wide(model.nlvr2(jnp.concatenate(joints, axis=-1)))
    return (jax.nn.softmax(logits, axis=-1)[:, 1],)
