"""Alignment scores equal a plain NumPy version on random attention, boxes and masks."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from scl_jax.evaluation.alignment import Example, Phrase, Region, attention_share, resize_mask, score_example, summarize

CAPTION = "a red star above a blue ring"
SPANS = {"red star": (2, 10), "blue ring": (19, 28)}


@dataclasses.dataclass
class RandomAttention:
    """Attention of seven words and the [CLS], a token each; a phrase is the sum of its words."""

    tokens: np.ndarray  # (8, F, R, C), the [CLS] first

    @property
    def overall(self):
        return self.tokens[0]

    def phrase(self, start, end):
        words = [i for i, word in enumerate(re.finditer(r"\w+", CAPTION)) if start <= word.start() < end]
        if not words:
            raise ValueError("not read")
        return self.tokens[1:][words].sum(axis=0)


def random_region(rng, frames, height, width):
    x0, y0 = rng.integers(0, width // 2), rng.integers(0, height // 2)
    box = (x0, y0, rng.integers(x0 + 1, width + 1), rng.integers(y0 + 1, height + 1))
    return Region(np.tile(np.array(box), (frames, 1)), rng.random((frames, height, width)) < 0.4)


def random_case(seed, frames=1, height=50, width=70):
    rng = np.random.default_rng(seed)
    phrases = tuple(
        Phrase(text, span, tuple(random_region(rng, frames, height, width) for _ in range(rng.integers(1, 4))))
        for text, span in SPANS.items()
    )
    grid = (6, 6)
    return RandomAttention(rng.random((8, frames, *grid))), Example(str(seed), b"", CAPTION, phrases)


def brute_force_mask(regions, kind, frames, height, width):
    union = np.zeros((frames, height, width))
    for region in regions:
        for frame in range(frames):
            for y in range(height):
                for x in range(width):
                    x0, y0, x1, y1 = region.boxes[frame]
                    inside = x0 <= x < x1 and y0 <= y < y1 if kind == "box" else region.mask[frame, y, x]
                    union[frame, y, x] = max(union[frame, y, x], float(inside))
    small = torch.nn.functional.interpolate(torch.tensor(union)[None], size=(6, 6), mode="bicubic", align_corners=False)
    return small[0].numpy()


def brute_force_share(attention, mask):
    inside = total = 0.0
    for frame in range(attention.shape[0]):
        for row in range(6):
            for column in range(6):
                inside += attention[frame, row, column] * mask[frame, row, column]
                total += attention[frame, row, column]
    return inside / total


def is_large(region, height, width):
    x0, y0, x1, y1 = region.boxes[0]
    return (x1 - x0) * (y1 - y0) > 0.9 * height * width


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_scores_equal_brute_force(frames, kind):
    for seed in range(3):
        attention, example = random_case(seed, frames)
        found = score_example(attention, example)
        regions = [region for phrase in example.phrases for region in phrase.regions]
        if kind == "box":
            regions = [region for region in regions if not is_large(region, 50, 70)]
        mask = brute_force_mask(regions, kind, frames, 50, 70)
        assert found["global"][kind] == pytest.approx(brute_force_share(attention.tokens[0], mask), abs=1e-9)
        assert found["global_uniform"][kind] == pytest.approx(mask.mean(), abs=1e-9)
        rows = {"red star": slice(2, 4), "blue ring": slice(6, 8)}  # after the [CLS]
        locals_ = []
        for phrase in example.phrases:
            own = attention.tokens[rows[phrase.text]].sum(axis=0)
            locals_.append(brute_force_share(own, brute_force_mask(phrase.regions, kind, frames, 50, 70)))
        assert found["local"][kind] == pytest.approx(np.mean(locals_), abs=1e-9)


def test_masks_are_resized_as_torch_does_it():
    mask = np.random.default_rng(0).random((2, 37, 53)) < 0.5
    tensor = torch.tensor(mask, dtype=torch.float64)[None]
    expected = torch.nn.functional.interpolate(tensor, size=(18, 18), mode="bicubic", align_corners=False)[0].numpy()
    np.testing.assert_allclose(resize_mask(mask, 18, 18), expected, atol=1e-9)


def test_attention_inside_the_region_scores_one_and_outside_zero():
    mask = np.zeros((1, 60, 60), bool)
    mask[0, :30] = True
    attention = np.zeros((1, 6, 6))
    attention[0, 0, 2] = 0.3
    assert attention_share(attention, resize_mask(mask, 6, 6)) == pytest.approx(1.0)
    assert attention_share(attention[:, ::-1], resize_mask(mask, 6, 6)) == pytest.approx(0.0)


def test_background_boxes_are_left_out_of_the_global_score_only():
    attention, example = random_case(1)
    background = Region(np.array([[0, 0, 70, 49]]), np.ones((1, 50, 70), bool))
    with_background = dataclasses.replace(example, phrases=(*example.phrases, Phrase("a", (0, 1), (background,))))
    plain, found = score_example(attention, example), score_example(attention, with_background)
    assert found["global"]["box"] == pytest.approx(plain["global"]["box"])
    assert found["global"]["mask"] == pytest.approx(1.0)
    like_the_authors = score_example(attention, with_background, drop_large_masks=True)
    assert like_the_authors["global"]["mask"] == pytest.approx(plain["global"]["mask"])
    assert found["phrases"][-1]["local"]["box"] > 0.9


def test_phrases_without_a_place_are_named_and_left_out():
    attention, example = random_case(2)
    lost = (Phrase("a cat", None, example.phrases[0].regions), Phrase("cut off", (90, 97), example.phrases[0].regions))
    found = score_example(attention, dataclasses.replace(example, phrases=(*example.phrases, *lost)))
    assert found["missing"] == ["a cat", "cut off"]
    assert found["local"] == score_example(attention, example)["local"]


def test_the_summary_is_the_mean_over_images_that_have_a_score():
    cases = [score_example(*random_case(seed)) for seed in range(3)]
    empty = score_example(random_case(0)[0], Example("empty", b"", CAPTION, ()))
    summary = summarize([*cases, empty])
    assert summary["images"] == 4 and summary["local/box/images"] == 3
    assert summary["local/box"] == pytest.approx(np.mean([one["local"]["box"] for one in cases]))
    assert summary["global/mask/uniform"] == pytest.approx(np.mean([one["global_uniform"]["mask"] for one in cases]))


def test_attention_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        attention_share(np.full((1, 2, 2), np.nan), np.ones((1, 2, 2)))
