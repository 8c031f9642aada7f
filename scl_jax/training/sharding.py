"""The mesh and the plan: which axis of which parameter lies on which mesh axis.

Mesh axes: "data" (batch), "fsdp" (batch, and parameters and optimizer state split), "tensor" (heads and feed-forward
width split). No collective is written by hand: XLA's partitioner derives them from this plan.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scl_jax.models import parameters
from scl_jax.models.parameters import Params
from scl_jax.partition import BATCH_AXES

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(BATCH_AXES)
LAYER = None  # the leading axis of stacked layers is never split

# dotted path → mesh axis of each dimension; the first match counts, and every parameter matches one
PLAN: list[tuple[str, tuple[str | None, ...]]] = [
    (r".*\.each\..*\.(qkv|query|key_value)\.kernel", (LAYER, "fsdp", None, "tensor", None)),  # (D, parts, H, d)
    (r".*\.each\..*\.(qkv|query|key_value)\.bias", (LAYER, None, "tensor", None)),
    (r".*\.each\..*\.out\.kernel", (LAYER, "tensor", "fsdp")),  # (H·d, D)
    (r".*\.each\..*mlp\.up\.kernel", (LAYER, "fsdp", "tensor")),
    (r".*\.each\..*mlp\.up\.bias", (LAYER, "tensor")),
    (r".*\.each\..*mlp\.down\.kernel", (LAYER, "tensor", "fsdp")),
    (r"text\.(word|position)_embedding\.embedding", (None, "fsdp")),  # (V, D)
    (r".*\.kernel", ("fsdp", None)),
    (r".*\.(bias|scale|embedding)|vision\.\w+_embedding|fusion\.token_type|contrastive\.temperature", ()),
]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A ("data", "fsdp", "tensor") mesh; one size may be -1: all devices that the others leave.

    Raises:
        ValueError: sizes that do not multiply to the number of devices, or "data" that does not divide by the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1 and 0 not in sizes:
        sizes[sizes.index(-1)] = len(devices) // int(np.prod([size for size in sizes if size != -1]))
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        wanted = f"data={data}, fsdp={fsdp}, tensor={tensor}"
        raise ValueError(
            f"config.mesh ({wanted}) does not fit {len(devices)} devices; the product must be their number"
        )
    types = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        # whole axes of the slice's torus where they fit, else parts of them: fsdp=8 on 4x4x4 chips
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    if sizes[0] % slices:
        raise ValueError(f"config.mesh.data is {sizes[0]}; {slices} slices need a multiple of {slices}")
    # between slices there is only the network of the data centre: "data" alone crosses it
    inside = (sizes[0] // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter; a dimension that its mesh axis does not divide stays whole.

    Raises:
        ValueError: a parameter that the plan does not know.
    """
    for pattern, axes in PLAN:
        if re.fullmatch(pattern, path):
            names = [
                axis if axis is not None and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape, strict=False)
            ]
            return PartitionSpec(*names)
    raise ValueError(f"no rule in training/sharding.py says how to split {path} {shape}")


def shard_params(shapes: Params, mesh: Mesh) -> Params:
    """A sharding for every parameter."""
    flat = parameters.flatten(shapes)
    return parameters.unflatten({path: NamedSharding(mesh, spec_of(path, x.shape, mesh)) for path, x in flat.items()})


def shard_optimizer(tx: optax.GradientTransformationExtraArgs, shapes: Params, mesh: Mesh) -> Any:
    """Shardings of the optimizer state: moments lie as their parameters do (`jit(tx.init)` would replicate them)."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, shapes),
        shard_params(shapes, mesh),
        transform_non_params=lambda _: replicated,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split along "data" and "fsdp"."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, in order.

    A mesh follows the wiring between chips, so a process's rows need not be neighbours, and "tensor" may give several
    processes the same ones. Whoever makes just these keeps the global batch the same for any number of processes.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (rows,) in places.values() for row in range(*rows.indices(batch_size))})  # pyright: ignore


def global_batch(arrays: Any, mesh: Mesh) -> Any:
    """Every process's rows (see `process_rows`) → one global array a leaf, split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), arrays)


def split_rows(arrays: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds whole → one global array a leaf, split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows]), arrays)


def whole(arrays: Any) -> Any:
    """Global arrays → NumPy, whole on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, arrays)
    return multihost_utils.process_allgather(arrays, tiled=True)
