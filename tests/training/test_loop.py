"""What the loop says about waiting for data: time counts only where the device had nothing left to do."""

import dataclasses
import time
from dataclasses import MISSING

import numpy as np
import pytest

from scl_jax.training.loop import Feed
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
