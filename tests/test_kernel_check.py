"""Before training on a TPU the attention kernel is compared with plain attention there."""

import jax
import pytest
import toy_run

from scl_jax import kernel_check, preflight
from scl_jax.config import finalize


def test_the_kernel_is_within_rounding_of_plain_attention():
    assert 0 < kernel_check.attention_error(interpret=True) < kernel_check.TOLERANCE / 2
    assert kernel_check.attention_problems(interpret=True) == []


@pytest.mark.parametrize("mistake", ["a weight", "scale"])
def test_a_kernel_that_is_wrong_is_told(monkeypatch, mistake):
    right = kernel_check.mosaic_attention

    def wrong(query, key, value, mask, *rest):
        if mistake == "scale":
            return right(query * 1.1, key, value, mask, *rest)
        return right(query, key, value, mask.at[1, 32].set(False), *rest)

    monkeypatch.setattr(kernel_check, "mosaic_attention", wrong)
    (problem,) = kernel_check.attention_problems(interpret=True)
    assert "set model.attention=xla" in problem


def test_it_is_asked_on_a_tpu_alone(monkeypatch, tmp_path):
    config = finalize(toy_run.config(tmp_path), 512)
    config.model.dtype = "bfloat16"
    monkeypatch.setattr(preflight, "attention_problems", lambda: ["wrong"])
    assert "wrong" not in preflight.missing(config, "train", False)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "wrong" in preflight.missing(config, "train", False)
    config.model.dtype = "float32"
    assert "wrong" not in preflight.missing(config, "train", False)
