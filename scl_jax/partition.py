"""Activations are split by sample, whatever the plan of the parameters.

Left alone, XLA's partitioner lets activations follow the parameters: with FSDP it splits their width, moves them
between layouts that it names "involuntary", and (jax 0.10, CPU and TPU) has been seen to permute the groups of local
completion on the way: a wrong loss without a warning. `split_batch` says where they belong, between any two layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # the mesh axes that samples are split over


def split_batch(tree: Any) -> Any:
    """Every array of `tree` with its leading axis (samples, or groups of them) split over the batch axes.

    A leading axis that the devices do not divide is split over "data" alone, or not at all. Without a mesh in force
    (see `on_mesh`) nothing happens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.tree.map(lambda x: _split(x, mesh), tree)


def batch_shards() -> int:
    """Over how many devices samples are split; 1 without a mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _size(mesh, BATCH_AXES)


def tensor_parallel() -> bool:
    """Whether the mesh in force splits heads."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["tensor"] > 1


def whole(x: jax.Array) -> jax.Array:
    """`x` on every device: a table that rows are looked up in is gathered once, its rows are not sent about."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def by_sample(function: Callable, *arrays: jax.Array) -> Any:
    """`function(*arrays)`, which treats every sample alone, on each device for the samples that it holds.

    For kernels that the partitioner cannot look into. Without a mesh in force of several devices it is a mere call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    rows = PartitionSpec(_axes(arrays[0].shape[0], mesh))
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)


def _split(x: jax.Array, mesh: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_axes(x.shape[0], mesh)))


def _axes(rows: int, mesh: Any) -> tuple[str, ...]:
    """The axes that so many rows are split over."""
    return next(axes for axes in (BATCH_AXES, BATCH_AXES[:1], ()) if rows % _size(mesh, axes) == 0)


def _size(mesh: Any, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function`, to be jitted, with `mesh` in force while it is traced."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced
