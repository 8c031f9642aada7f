"""Losses and accuracies of classifiers: answers with soft scores, and one class of several (METHOD section 7).

Axes: B batch, A answers, K classes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scl_jax.types import LossSum


def answer_loss(logits: Float[Array, "B A"], scores: Float[Array, "B A"], weight: Float[Array, " B"]) -> LossSum:
    """Binary cross entropy with soft scores, summed over the answers; the mean is over the batch."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    terms = scores * jax.nn.log_sigmoid(logits) + (1 - scores) * jax.nn.log_sigmoid(-logits)
    return LossSum(-jnp.sum(terms.sum(axis=-1) * weight), jnp.sum(weight))


def answer_score(logits: Float[Array, "B A"], scores: Float[Array, "B A"], weight: Float[Array, " B"]) -> LossSum:
    """The soft scores of the answers given; the mean is the accuracy of VQA on answers of the vocabulary."""
    given = jnp.take_along_axis(scores, logits.argmax(axis=-1)[:, None], axis=1)[:, 0]
    return LossSum(jnp.sum(given * weight), jnp.sum(weight))


def class_loss(logits: Float[Array, "B K"], labels: Int[Array, " B"], weight: Float[Array, " B"]) -> LossSum:
    """Cross entropy; logits of -inf are classes that a row does not have, labels of -1 are unknown and do not count."""
    weight = weight * (labels >= 0)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    terms = jax.nn.logsumexp(logits, axis=-1) - chosen
    return LossSum(jnp.sum(terms * weight), jnp.sum(weight))


def class_correct(logits: Float[Array, "B K"], labels: Int[Array, " B"], weight: Float[Array, " B"]) -> LossSum:
    """How many of those with a label are told right; the mean is the accuracy.

    Of n classes with the same highest logit each counts 1/n, so that it does not matter at which place the true one is.
    """
    weight = weight * (labels >= 0)
    top = logits == logits.max(axis=-1, keepdims=True)
    hit = jnp.take_along_axis(top, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return LossSum(jnp.sum(hit / jnp.maximum(top.sum(axis=-1), 1) * weight), jnp.sum(weight))
