"""A pre-training task that goes wrong at chosen steps, for tests of what a run does then.

    python -m tests.faults.poison <steps> <objective> <loss|gradient> --config=… --workdir=…

is `scl_jax.main` with it. A batch is known by the first of its items, so that the same batch is wrong in a replay.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp

from scl_jax.session import Session
from scl_jax.tasks.pretrain import Pretraining


@dataclasses.dataclass(frozen=True)
class Poisoned(Pretraining):
    """Pre-training whose `objective` is NaN, or has a gradient that is, in batches that begin with `items`."""

    items: tuple[int, ...] = ()
    objective: str = "matching"
    kind: str = "loss"

    def features(self, model, batch, masks, active, key):
        outputs = super().features(model, batch, masks, active, key)
        loss = outputs.losses[self.objective]
        bad = jnp.isin(batch.item_id[0], jnp.asarray(self.items))
        if self.kind == "loss":
            total = loss.total * jnp.where(bad, jnp.nan, 1.0)
        else:  # the square root of 0 is 0, its slope infinite; that of 1 adds nothing
            total = loss.total + jnp.sqrt(jnp.where(bad, loss.total - jax.lax.stop_gradient(loss.total), 1.0)) - ~bad
        losses = {**outputs.losses, self.objective: dataclasses.replace(loss, total=total)}
        return dataclasses.replace(outputs, losses=losses)


def first_items(session: Session, steps: list[int]) -> tuple[int, ...]:
    """The first item of the batch of each of these steps (from 1); AssertionError: it begins another batch, too."""
    iterator = iter(session.training_data())
    firsts = [int(next(iterator)["item_id"][0]) for _ in range(session.config.train.steps)]
    wanted = tuple(firsts[step - 1] for step in steps)
    also = [step for step, first in enumerate(firsts, start=1) if first in wanted and step not in steps]
    assert not also, f"steps {also} begin with the same item"
    return wanted


def poison(session: Session, steps: list[int], objective: str = "matching", kind: str = "loss") -> None:
    """Makes a session's task go wrong at these steps."""
    fields = {field.name: getattr(session.task, field.name) for field in dataclasses.fields(Pretraining)}
    session.task = Poisoned(**fields, items=first_items(session, steps), objective=objective, kind=kind)


def poison_all(steps: list[int], objective: str, kind: str) -> None:
    """Does so for every session to come."""
    make = Session.__init__

    def made(self, *arguments, **options):
        make(self, *arguments, **options)
        poison(self, steps, objective, kind)

    Session.__init__ = made


if __name__ == "__main__":
    poison_all([int(step) for step in sys.argv[1].split(",")], *sys.argv[2:4])
    what = sys.argv.pop(4) if sys.argv[4] == "replay" else "train"
    del sys.argv[1:4]
    if what == "replay":
        from scl_jax import replay

        replay.main()
    else:
        from absl import app

        from scl_jax import main

        app.run(main.main)
