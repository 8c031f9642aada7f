"""What a run says and leaves: restarts leave no trace, other processes write nothing, speed stays apart."""

import io
import json
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from scl_jax.config import default_config
from scl_jax.training import logging
from scl_jax.training.logging import RunLog, format_number, plain_line, results_table
from scl_jax.training.records import read_lines


def numbers(step):
    return {"loss/total": 1.0 / step, "loss/matching": np.float32(0.5), "speed/mfu": 0.3}


def test_a_restarted_run_leaves_the_metrics_of_an_undisturbed_one(tmp_path):
    with RunLog(tmp_path / "whole", 6, console=False, tensorboard=False) as log:
        for step in range(1, 7):
            log.write(step, numbers(step))
    with RunLog(tmp_path / "killed", 6, console=False, tensorboard=False) as log:
        for step in range(1, 6):
            log.write(step, numbers(step))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss/tot')
    with RunLog(tmp_path / "killed", 6, console=False, tensorboard=False, resume_step=3) as log:
        for step in range(4, 7):
            log.write(step, numbers(step))
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == whole


def test_an_evaluation_keeps_what_training_logged(tmp_path):
    for resume_step in (0, None):
        with RunLog(tmp_path, 1, console=False, tensorboard=False, resume_step=resume_step) as log:
            log.write(1, {"loss/total": 0.5})
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


def test_numbers_that_depend_on_the_clock_stay_apart(tmp_path):
    with RunLog(tmp_path, 1, console=False, tensorboard=False) as log:
        log.write(1, {"loss/total": jnp.float32(0.5), "speed/examples_per_second": 100})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/total": 0.5}]
    assert read_lines(tmp_path / "speed.jsonl") == [{"step": 1, "speed/examples_per_second": 100}]


def test_tensorboard_files_are_written_without_tensorflow(tmp_path):
    with RunLog(tmp_path, 1, console=False) as log:
        log.write(1, {"loss/total": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss/total" in events.read_bytes()
    assert "tensorflow" not in sys.modules


def test_other_processes_write_nothing(tmp_path):
    with RunLog(tmp_path / "work", 2, is_main=False, wandb_project="ignored") as log:
        log.save_config(default_config())
        log.write(1, numbers(1))
        log.status(1)
        log.truncate_after(0)
        log.results({"a": 1.0})
    assert not (tmp_path / "work").exists()


def test_config_environment_and_results_are_saved(tmp_path, capsys):
    config = default_config()
    with RunLog(tmp_path, 1, console=False, tensorboard=False) as log:
        log.save_config(config)
        log.results({"retrieval/text_to_image/recall@1": np.float32(0.25), "matching/accuracy": 0.5})
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["b2"] == config.optimizer.b2
    assert json.loads((tmp_path / "environment.json").read_text())["jax"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {"retrieval/text_to_image/recall@1": 0.25, "matching/accuracy": 0.5}
    assert "25.0 %" in capsys.readouterr().out


def test_without_a_terminal_there_is_one_plain_line_a_write(tmp_path, capsys):
    with RunLog(tmp_path, 20, tensorboard=False) as log:
        log.status(1)
        log.write(2, {"loss/total": 1.5, "loss/local_text": 0.25, "speed/mfu": 0.314, "weight/matching": 1.0})
        log.say("saved [checkpoint] 2")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step  2/20  loss total 1.5, local text 0.25 · speed mfu 31.4 %"
    assert second == "saved [checkpoint] 2"


def test_a_terminal_shows_losses_and_progress(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(logging, "Console", lambda: Console(file=screen, force_terminal=True, width=100))
    with RunLog(tmp_path, 20, tensorboard=False) as log:
        log.status(3)
        log.write(10, {"loss/total": 1.5, "loss/global_text": 0.25, "accuracy/matching": 0.875})
    for words in ("10/20", "global text", "0.25", "accuracy matching", "87.5 %"):
        assert words in screen.getvalue()


def test_a_work_directory_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="choose another --workdir"):
        RunLog(tmp_path / "file" / "work", 1)


def test_wandb_is_asked_for_by_name_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        RunLog(tmp_path, 1, console=False, tensorboard=False, wandb_project="scl")


def test_a_restart_continues_its_curves_and_a_new_run_in_the_same_place_begins_others(tmp_path, monkeypatch):
    """W&B takes no steps before the last one of a run that it knows: those of the new run would be lost."""
    asked: list[str] = []

    def init(**options):
        asked.append(options["id"])
        return SimpleNamespace(finish=lambda: None)

    def start(workdir):
        RunLog(workdir, 1, console=False, tensorboard=False, wandb_project="scl").close()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    start(tmp_path / "run")
    start(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    start(tmp_path / "moved")
    start(tmp_path / "run")
    assert asked[0] == asked[1] == asked[2] != asked[3]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("retrieval/text_to_image/recall@1", 0.4612, "46.1 %"),
        ("retrieval/pairs_scored", 12500, "12,500"),
        ("learning_rate", 1.5e-5, "1.5e-05"),
        ("loss/total", 3.14159, "3.142"),
        ("loss/total", float("nan"), "nan"),
        ("loss/total", float("inf"), "inf"),
    ],
)
def test_numbers_read_well(name, value, shown):
    assert format_number(name, value) == shown


def test_contrastive_retrieval_is_left_to_the_files():
    shown = plain_line({"retrieval/text_to_image/recall@1": 0.5})
    assert shown == "retrieval/text to image recall@1 50.0 %"
    assert not logging.is_headline("retrieval/contrastive/text_to_image/recall@1")
    assert not logging.is_headline("retrieval/text_to_image/median_rank")
    assert logging.is_headline("retrieval/video/mean_recall")


def test_the_results_table_has_a_row_a_metric():
    assert results_table({"a/x": 1.0, "a/y": 2.0, "b": 3.0}).row_count == 3
