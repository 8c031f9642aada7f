"""The best checkpoint is kept, and known after a restart."""

import numpy as np

from scl_jax.training.checkpoint import Checkpoints
from scl_jax.training.state import TrainState


def save(checkpoints: Checkpoints, values: dict[int, float | None]) -> None:
    for step, value in values.items():
        state = TrainState(np.zeros([], np.int32), {"x": np.ones(2)}, ())  # type: ignore[arg-type]
        checkpoints.save(step, state, {}, None if value is None else {"accuracy": value})
    checkpoints.wait()
    checkpoints.close()


def test_the_best_checkpoint_survives_later_ones_and_a_restart(tmp_path):
    options = {"keep_latest": 1, "keep_best": 1, "best_metric": "accuracy"}
    save(Checkpoints(tmp_path, **options), {1: 0.2, 2: 0.6, 3: 0.4, 4: None})
    again = Checkpoints(tmp_path, **options)
    assert again.best() == 2 and again.latest() == 4
    save(again, {5: 0.5, 6: None})
    restarted = Checkpoints(tmp_path, **options)
    assert restarted.best() == 2 and restarted.latest() == 6
    save(restarted, {7: 0.7})
    assert Checkpoints(tmp_path, **options).best() == 7


def test_without_an_evaluation_there_is_no_best_checkpoint(tmp_path):
    save(Checkpoints(tmp_path, best_metric="accuracy"), {1: None})
    assert Checkpoints(tmp_path, best_metric="accuracy").best() is None
