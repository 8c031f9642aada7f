"""Accuracies of a pre-trained model are those of every pair of a set, under masks that stay the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.evaluation.pretraining import PretrainingEvaluation
from scl_jax.training.sharding import make_mesh
from scl_jax.types import LossSum


class Pairs:
    """Three items in batches of two, the last one padded."""

    def pairs(self):
        text = np.zeros((2, 3), np.int32)
        for rows, weight in ((np.array([0, 1]), np.ones(2)), (np.array([2, 2]), np.array([1.0, 0.0]))):
            yield {
                "pixels": np.zeros((2, 1, 1, 1, 3), np.uint8), "token_ids": text, "token_mask": text > 0,
                "word_ids": text, "item_id": rows.astype(np.int32), "weight": weight.astype(np.float32),
            }  # fmt: skip


def test_accuracies_are_over_all_batches_and_masks_differ_by_batch_alone():
    keys = []

    def accuracies(params, batch, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return {"matching": LossSum(jnp.sum((batch.item_id == 0) * batch.weight), jnp.sum(batch.weight))}

    evaluation = PretrainingEvaluation.__new__(PretrainingEvaluation)  # without a network
    evaluation._mesh, evaluation._key = make_mesh(devices=jax.devices()[:1]), jax.random.key(0)
    evaluation._accuracies = accuracies
    for _ in range(2):
        assert evaluation.accuracy({}, Pairs()) == {"matching": pytest.approx(1 / 3)}
    assert keys[:2] == keys[2:] and keys[0] != keys[1]
