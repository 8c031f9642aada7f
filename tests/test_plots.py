"""The pictures are written, at the size of what they show, and say what is missing."""

import json

import numpy as np
import pytest
from PIL import Image

from scl_jax.evaluation.ranking import rank
from scl_jax.plots import _running_mean, loss_curves, retrieval_sheet, shortened


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_loss_curves_have_a_panel_an_objective(tmp_path):
    few = [{"step": step, "loss/total": 2.0, "loss/matching": 0.7} for step in range(3)]
    more = [
        {**record, "loss/videos/contrastive": None, "loss/global_text": 10.0**-step, "accuracy/matching": 0.5}
        for step, record in enumerate(few)
    ]
    more.append({"step": 3, "retrieval/text_to_image/recall@1": 0.25, "learning_rate": 1e-4})
    small = Image.open(loss_curves(write_lines(tmp_path / "few.jsonl", few), tmp_path / "few.png"))
    large = Image.open(loss_curves(write_lines(tmp_path / "more.jsonl", more), tmp_path / "deep" / "more.png"))
    ratios = (large.width / small.width, large.height / small.height)
    assert ratios == pytest.approx((2, 2), abs=0.02)  # 2 panels in one row, 7 in two rows of four


def test_loss_curves_of_a_run_that_was_killed_while_writing(tmp_path):
    path = write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss/total": 1.0}])
    path.write_text(path.read_text() + '{"step": 2, "loss/to')
    assert loss_curves(path, tmp_path / "curves.png").exists()


def test_loss_curves_without_losses_say_so(tmp_path):
    with pytest.raises(ValueError, match="holds no loss"):
        loss_curves(write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "learning_rate": 0.1}]), tmp_path / "no.png")


def test_running_mean_keeps_constants_and_bridges_gaps():
    values = np.full(90, 3.0)
    values[10] = np.nan
    np.testing.assert_allclose(_running_mean(values), 3.0)
    assert np.isnan(_running_mean(np.full(9, np.nan))).all()


@pytest.mark.parametrize(("frames", "kind"), [(1, "image"), (6, "video")])
def test_retrieval_sheet_frames_the_right_answer_in_green(tmp_path, frames, kind):
    features = np.eye(5, dtype=np.float32)
    text_items = np.arange(5)
    grey = np.full((frames, 20, 30, 3), 128, np.uint8)  # wider than tall
    ranking = rank(features, features, text_items, item=kind)
    captions = ["a caption so long that it must be folded over several lines to fit beside the pictures"] * 5
    captions[0] = "sale: $5 off 50% or $10"  # no formula
    path = retrieval_sheet(ranking, captions, text_items, lambda item: grey, tmp_path / "s.png", queries=3, kind=kind)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    green = (abs(picture - [26, 152, 80]) < 20).all(-1)
    assert green.sum() > 1000
    assert abs(picture - 128).max(-1).__lt__(3).mean() > 0.05  # the thumbnails


def test_a_caption_without_spaces_is_cut_within():
    assert shortened("a red star  beside a blue ring", 20) == "a red star beside …"
    assert shortened("星" * 80, 58) == "星" * 56 + " …"
    assert shortened("a red star", 10) == "a red star"
