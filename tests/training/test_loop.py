"""What the loop says about waiting for data: time counts only where the device had nothing left to do."""

import dataclasses
import time
from dataclasses import MISSING

import numpy as np
import pytest

from scl_jax.training.loop import Feed, Window
from scl_jax.training.sharding import make_mesh
from scl_jax.types import Batch

SECONDS = 0.05


class SlowIterator:
    """Batches that take `SECONDS` each."""

    def get_state(self):
        return {}

    def __next__(self):
        time.sleep(SECONDS)
        fields = {field.name: np.zeros((8, 1)) for field in dataclasses.fields(Batch) if field.default is MISSING}
        return {"stream": "images", **fields}


class Running:
    """An array of a step that is still computed, or is not."""

    def __init__(self, ready):
        self.is_ready = lambda: ready


@pytest.mark.parametrize(("ready", "counts"), [((False, False), False), ((True, False), False), ((True, True), True)])
def test_waiting_counts_where_the_step_in_flight_has_ended(ready, counts):
    feed = Feed(SlowIterator(), make_mesh())
    feed.fetch([Running(r) for r in ready])
    assert (feed.waited >= SECONDS) if counts else (feed.waited == 0)


def test_waiting_for_the_first_batch_counts():
    feed = Feed(SlowIterator(), make_mesh())
    feed.take()
    assert feed.waited >= SECONDS


def test_what_a_checkpoint_got_of_a_window_stays_as_it_was():
    """Savers write it in the background while the loop goes on."""
    window = Window()
    window.add("images", {"loss/total": np.float32(2)})
    saved = window.state()
    window.add("images", {"loss/total": np.float32(3)})
    window.means()
    assert saved == {"loss/images/total": [2.0, 1.0], "skipped_updates": [0.0, 1.0]}
