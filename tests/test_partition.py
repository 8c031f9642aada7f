"""Where activations lie, whatever the plan of the parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from scl_jax.partition import on_mesh, split_batch, whole
from scl_jax.training.sharding import make_mesh


@pytest.mark.parametrize(
    ("rows", "spec"),
    [(16, PartitionSpec(("data", "fsdp"))), (6, PartitionSpec("data")), (5, PartitionSpec())],
    ids=["all devices", "data alone", "not at all"],
)
def test_rows_are_split_over_as_many_devices_as_divide_them(rows, spec):
    mesh = make_mesh(2, 4, 1)
    columns = jax.device_put(jnp.ones((rows, 8)), jax.sharding.NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    (split,) = jax.jit(on_mesh(mesh, lambda x: split_batch((2 * x,))))(columns)
    assert split.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), split.ndim)


def test_a_table_is_gathered():
    mesh = make_mesh(2, 4, 1)
    table = jax.device_put(jnp.ones((16, 8)), jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp")))
    assert jax.jit(on_mesh(mesh, lambda x: whole(2 * x)))(table).sharding.is_fully_replicated


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((3, 2))
    assert split_batch(x) is x and whole(x) is x
