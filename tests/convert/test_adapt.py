"""The named steps that bring weights of other sizes into a model."""

from __future__ import annotations

import numpy as np
import pytest
from golden_case import GOLDEN

from scl_jax.convert import adapt
from scl_jax.convert.rules import ConversionError


@pytest.mark.parity
def test_position_tables_are_resized_as_torch_does_it() -> None:
    recorded = np.load(GOLDEN / "tiny_interp.npz")
    cases = sorted({name.rsplit("/", 1)[0] for name in recorded.files})
    assert len(cases) >= 6
    for case in cases:
        after = recorded[f"{case}/after"]
        resized = adapt.resize_position_rows(recorded[f"{case}/before"], len(after))
        np.testing.assert_allclose(resized, after, rtol=0, atol=2e-5, err_msg=case)


def test_a_table_that_is_no_square_is_an_error() -> None:
    with pytest.raises(ValueError, match="18 rows"):
        adapt.resize_position_rows(np.zeros((18, 4), np.float32), 17)


def test_frames_are_cut_or_filled_with_zeros() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    np.testing.assert_array_equal(adapt.fit_temporal_rows(rows, 2), rows[:2])
    more = adapt.fit_temporal_rows(rows, 6)
    np.testing.assert_array_equal(more[:4], rows)
    assert not more[4:].any()


def test_the_second_image_starts_as_the_first() -> None:
    rows = np.arange(4, dtype=np.float32).reshape(2, 2)
    np.testing.assert_array_equal(adapt.fit_token_types(rows, 3), rows[[0, 1, 1]])
    np.testing.assert_array_equal(adapt.fit_token_types(rows[[0, 1, 1]], 2), rows)


def test_text_positions_are_cut_but_never_made_up() -> None:
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    np.testing.assert_array_equal(adapt.cut_text_positions(rows, 3), rows[:3])
    with pytest.raises(ValueError, match="max_positions"):
        adapt.cut_text_positions(rows, 6)


def test_the_rank_head_starts_from_row_1_of_the_matching_head() -> None:
    kernel, bias = np.arange(8, dtype=np.float32).reshape(4, 2), np.array([5.0, 7.0], np.float32)
    fitted, steps = adapt.fit(
        {"matching.dense.kernel": kernel, "matching.dense.bias": bias}, {"rank.kernel": (4, 1), "rank.bias": (1,)}
    )
    np.testing.assert_array_equal(fitted["rank.kernel"], kernel[:, 1:])
    np.testing.assert_array_equal(fitted["rank.bias"], bias[1:])
    assert any("row 1 of the matching head" in step for step in steps)
    own = {"rank.kernel": np.ones((4, 1), np.float32), "rank.bias": np.ones(1, np.float32)}
    both = {"matching.dense.kernel": kernel, "matching.dense.bias": bias} | own
    fitted, _ = adapt.fit(both, {path: x.shape for path, x in both.items()})
    np.testing.assert_array_equal(fitted["rank.kernel"], own["rank.kernel"])  # a trained one stays


def test_what_no_step_can_fit_is_named_with_both_shapes() -> None:
    weights = {"text.word_embedding.embedding": np.zeros((7, 4), np.float32), "vision.odd": np.zeros(1, np.float32)}
    with pytest.raises(ConversionError) as error:
        adapt.fit(weights, {"text.word_embedding.embedding": (9, 4), "text.norm.scale": (4,)})
    message = str(error.value)
    assert "text_transformer.embeddings.word_embeddings.weight) is (7, 4), but the model needs (9, 4)" in message
    assert "missing: text.norm.scale" in message and "unused: vision.odd" in message
