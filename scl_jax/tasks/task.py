"""What a task is to the training step: the losses of a batch, in two parts, so that accumulation is exact.

Axes: B batch, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Protocol, TypeVar

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from scl_jax.models.parameters import Params
from scl_jax.models.scl import SCL
from scl_jax.types import Batch, LossSum

T = TypeVar("T")


@flax.struct.dataclass
class WholeBatch:
    """Vectors compared over the whole batch, by name, with the weight of their samples; and the temperature."""

    vectors: dict[str, Float[Array, "B *axes"]]
    weight: Float[Array, " B"]
    temperature: Float[Array, ""]


@flax.struct.dataclass
class Outputs:
    """What one pass over a (micro-)batch gives."""

    losses: dict[str, LossSum]
    accuracies: dict[str, LossSum]
    whole_batch: WholeBatch


class Task(Protocol):
    """Which heads, which losses. `features` runs the network, `whole_batch_losses` compares what it gives.

    A micro-batch takes whole groups of `group_size` samples; losses of `features` stay inside a group.
    """

    @property
    def group_size(self) -> int: ...

    def active(self, step: int) -> tuple[str, ...]:
        """The losses that take part in step number `step`; each set of them is compiled once."""
        ...

    def weights(self, step: Any) -> dict[str, Any]:
        """The weight of every loss at `step` (traced)."""
        ...

    def draw_masks(self, batch: Batch, key: Key[Array, ""]) -> Any:
        """Everything random of a whole batch but dropout, a tree of arrays (B, …); None for nothing."""
        ...

    def features(
        self, model: SCL, batch: Batch, masks: Any, active: Collection[str], key: Key[Array, ""] | None
    ) -> Outputs:
        """One pass of the network over a (micro-)batch; `key` switches dropout on."""
        ...

    def whole_batch_losses(self, features: WholeBatch) -> dict[str, LossSum]:
        """The losses whose negatives are the whole batch."""
        ...

    def constrain(self, params: Params) -> Params:
        """Parameters after an update, back in their ranges."""
        ...


@dataclasses.dataclass(frozen=True)
class ClassifierTask:
    """What the tasks with one classifier share: one loss, nothing random, nothing compared over the batch.

    A task says the name of its `loss`, how its `logits` come about, and how `judge` rates them.
    """

    group_size = 1
    loss = ""

    def logits(self, model: SCL, batch: Batch, key: Key[Array, ""] | None = None) -> Float[Array, "B K"]:
        """The logits of the classes; `key` switches dropout on."""
        raise NotImplementedError

    def judge(self, logits: Float[Array, "B K"], batch: Batch) -> tuple[LossSum, LossSum]:
        """Loss and accuracy of logits."""
        raise NotImplementedError

    def active(self, step: int) -> tuple[str, ...]:
        """Its one loss."""
        return (self.loss,)

    def weights(self, step: Any) -> dict[str, Any]:
        """It counts fully."""
        return {self.loss: 1.0}

    def draw_masks(self, batch: Batch, key: Key[Array, ""]) -> None:
        """Nothing is random but dropout."""

    def features(
        self, model: SCL, batch: Batch, masks: None, active: Collection[str], key: Key[Array, ""] | None
    ) -> Outputs:
        """One pass of the network over a (micro-)batch; `key` switches dropout on."""
        loss, accuracy = self.judge(self.logits(model, batch, key), batch)
        nothing = WholeBatch({}, batch.weight, jnp.zeros([]))
        return Outputs({self.loss: loss}, {self.loss: accuracy}, nothing)

    def whole_batch_losses(self, features: WholeBatch) -> dict[str, LossSum]:
        """None."""
        return {}

    def constrain(self, params: Params) -> Params:
        """They may be anything."""
        return params


def needed(value: T | None, field: str) -> T:
    """A field of the batch that this task reads.

    Raises:
        ValueError: the data set does not give it.
    """
    if value is None:
        raise ValueError(f"this task needs {field!r} in every batch: its data set must be one made for the task")
    return value


def bounded_temperature(params: Params, bounds: tuple[float, float] | None) -> Params:
    """Parameters with the contrastive temperature inside `bounds`; None: not bounded."""
    if bounds is None:
        return params
    temperature = jnp.clip(params["contrastive"]["temperature"], *bounds)
    return {**params, "contrastive": {**params["contrastive"], "temperature": temperature}}
