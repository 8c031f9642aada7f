"""Heads on top of the encoders (METHOD sections 4 and 7).

Axes: B batch, D width, J = 2D joint width, E width of the contrastive space, V vocabulary, K classes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from scl_jax.models.layers import Linear, Precision, gelu

UNIT_EPS = 1e-8


def unit(x: Float[Array, "... D"], axis: int = -1) -> Float[Array, "... D"]:
    """`x / max(‖x‖, 1e-8)` in at least float32; its gradient is finite at 0."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, UNIT_EPS**2))


def scoring(width: int, scores: int, precision: Precision, rngs: nnx.Rngs) -> Linear:
    """The last linear map of a head whose scores are compared, in at least float32: in bfloat16 many would be equal."""
    wide = dataclasses.replace(precision, dtype=jnp.promote_types(precision.dtype, jnp.float32), units="")
    return wide.linear(width, scores, precision.bert_init, rngs)


class ProjectionHead(nnx.Module):
    """`Linear(D, D) → LayerNorm → GELU → Linear(D, E)` into the contrastive space, before normalisation."""

    def __init__(self, width: int, out: int, precision: Precision, rngs: nnx.Rngs):
        self.dense = precision.linear(width, width, precision.bert_init, rngs)
        self.norm = precision.norm(width, 1e-5, rngs)
        self.out = precision.linear(width, out, precision.bert_init, rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        return self.out(gelu(self.norm(self.dense(x))))


class ContrastiveHead(nnx.Module):
    """Projections of both modalities and the learned temperature, which divides."""

    def __init__(self, width: int, out: int, temperature: float, precision: Precision, rngs: nnx.Rngs):
        self.text = ProjectionHead(width, out, precision, rngs)
        self.image = ProjectionHead(width, out, precision, rngs)
        self.temperature = nnx.Param(jnp.asarray(temperature, precision.param_dtype))


class MatchingHead(nnx.Module):
    """Joint vector → logits of (other, pair), in at least float32."""

    def __init__(self, width: int, precision: Precision, rngs: nnx.Rngs):
        self.dense = scoring(2 * width, 2, precision, rngs)

    @jax.named_scope("matching_head")
    def __call__(self, joint: Float[Array, "B J"]) -> Float[Array, "B 2"]:
        return self.dense(joint)


class MaskedLanguageHead(nnx.Module):
    """Dense, GELU, LayerNorm, then a decoder to the vocabulary that is not tied to the embeddings."""

    def __init__(self, width: int, vocab_size: int, precision: Precision, rngs: nnx.Rngs):
        self.dense = precision.linear(width, width, precision.bert_init, rngs)
        self.norm = precision.norm(width, 1e-12, rngs)  # BERT's epsilon
        self.decoder = precision.linear(width, vocab_size, precision.bert_init, rngs)

    @jax.named_scope("masked_language_head")
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        return self.decoder(self.norm(gelu(self.dense(x))))


class Classifier(nnx.Module):
    """`Linear → LayerNorm → GELU → Linear`, the head of VQA, NLVR2 and SNLI-VE; logits in at least float32."""

    def __init__(self, width: int, hidden: int, classes: int, precision: Precision, rngs: nnx.Rngs):
        self.dense = precision.linear(width, hidden, precision.bert_init, rngs)
        self.norm = precision.norm(hidden, 1e-5, rngs)
        self.out = scoring(hidden, classes, precision, rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        return self.out(gelu(self.norm(self.dense(x))))
