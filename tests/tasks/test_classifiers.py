"""What the tasks with one classifier hand to the network: keys of dropout, images, token types."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.models.fusion import IMAGE_TYPE, SECOND_IMAGE_TYPE
from scl_jax.tasks.entailment import Entailment
from scl_jax.tasks.nlvr2 import Statements
from scl_jax.tasks.vqa import QuestionAnswering
from scl_jax.types import Batch

TASKS = (QuestionAnswering(), Entailment(), Statements())
TEXT = jnp.ones((2, 3), jnp.int32)
BATCH = Batch(
    pixels=jnp.full((2, 1, 1, 1, 3), 10.0),
    second_pixels=jnp.full((2, 1, 1, 1, 3), 20.0),
    token_ids=TEXT, token_mask=TEXT > 0, word_ids=TEXT, weight=jnp.ones(2), item_id=TEXT[:, 0],
)  # fmt: skip


def network(keys: list) -> SimpleNamespace:
    """Its joint vectors are (the image's pixels, the token type); its classifiers give what they get."""

    def encode_text(ids, mask, key):
        keys.append(key)
        return ids

    def joint(text, mask, image, frames, key, image_type=IMAGE_TYPE):
        keys.append(key)
        return jnp.stack([image.reshape(2, -1).mean(axis=1), jnp.full(2, image_type)], axis=1)

    heads = {name: lambda x: x for name in ("vqa", "entailment", "nlvr2")}
    return SimpleNamespace(encode_text=encode_text, encode_image=lambda pixels: pixels, joint=joint, **heads)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.loss)
def test_every_pass_has_a_key_of_its_own(task):
    keys = []
    task.logits(network(keys), BATCH, jax.random.key(0))
    assert len(keys) == (3 if task.loss == "nlvr2" else 2)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)
    keys.clear()
    task.logits(network(keys), BATCH)
    assert set(keys) == {None}


def test_a_statement_is_read_with_its_first_image_then_with_its_second():
    logits = Statements().logits(network([]), BATCH)
    np.testing.assert_array_equal(logits, [[10, IMAGE_TYPE, 20, SECOND_IMAGE_TYPE]] * 2)
