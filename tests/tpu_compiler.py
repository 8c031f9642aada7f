"""What the TPU compiler says about slices that are not there: `python tests/tpu_compiler.py FILE OBJECTIVE…`, as JSON.

A process of its own, so that libtpu is loaded in no other test's.
"""

import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import toy_run
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from scl_jax import remat
from scl_jax.compile_tpu import compile_step, describe, tpu_devices
from scl_jax.config import finalize
from scl_jax.models.mosaic_attention import mosaic_attention
from scl_jax.objectives.views import OBJECTIVES
from scl_jax.training import sharding

SLICES = ("v5e:16x16", "v4:4x4x4", "v5p:8x8x16", "v6e:8x8")


def rows_of_hosts() -> dict[int, list[int]]:
    """The rows of a batch of 64 that the hosts of a v5e:4x4 hold, by host."""
    mesh = sharding.make_mesh(-1, 4, 1, devices=tpu_devices("v5e:4x4"))
    rows: dict[int, list[int]] = {}
    for device, (part,) in sharding.batch_sharding(mesh).devices_indices_map((64,)).items():
        rows.setdefault(device.process_index, []).extend(range(*part.indices(64)))
    return rows


def chips_of_meshes() -> dict[str, int]:
    """How many different chips a mesh holds whose fsdp axis is only a part of one of the torus's, by slice and size."""
    cases = (("v4:4x4x4", 8), ("v5p:8x8x16", 4), ("v6e:8x8", 4), ("v5e:16x16", 8))
    meshes = {f"{name} fsdp={size}": sharding.make_mesh(-1, size, 1, devices=tpu_devices(name)) for name, size in cases}
    return {name: len({device.id for device in mesh.devices.flat}) for name, mesh in meshes.items()}


def slices_of_data() -> dict:
    """Of two slices of v5e:4x4: which slices each row of the mesh touches, and what a mesh that must not be says."""
    devices = list(topologies.get_topology_desc("v5e:4x4", platform="tpu", num_slices=2).devices)
    mesh = sharding.make_mesh(-1, 8, 1, devices=devices)
    rows = [sorted({device.slice_index for device in row.flat}) for row in mesh.devices]
    try:
        sharding.make_mesh(1, 32, 1, devices=devices)
    except ValueError as error:
        return {"data": mesh.shape["data"], "slices": rows, "error": str(error)}
    raise AssertionError("a mesh whose fsdp axis crosses slices was made")


def small_step(objectives: tuple[str, ...], batch_size: int = 64) -> dict:
    """The findings on a step with these objectives for eight chips."""
    config = toy_run.config(Path("nowhere"), **{"mesh.fsdp": 4, "data.videos.share": 0.0})
    config.data.images.batch_size = batch_size
    for part in (config.model.vision, config.model.text, config.model.fusion):
        part.update(
            width=256, mlp_width=512
        )  # tiles of 128 columns would hide how little of narrower arrays a chip holds
    for name in set(OBJECTIVES) - set(objectives):
        config.objectives[name].weight = 0.0
    config = finalize(config, 512)
    found = compile_step(config, "images", tpu_devices("v5e:2x4"), "v5e:2x4")
    return dataclasses.asdict(found) | {"described": describe(found)}


def kernels() -> dict[str, int]:
    """How many kernels attention and its gradients take on each kind of chip: clips' two blocks of queries."""

    def loss(query, key, value, mask, words):
        y = mosaic_attention(query, key, value, mask, 0.1, jax.random.wrap_key_data(words))
        return y.astype(jnp.float32).sum()

    rows = 2048  # their numbers fit the memory for scalars
    shapes = [(rows, n, 4, 64) for n in (788, 325, 325)]
    arrays = [(shape, jnp.bfloat16) for shape in shapes] + [((rows, 325), jnp.bool_), ((2,), jnp.uint32)]
    found = {}
    for topology in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
        chip = SingleDeviceSharding(tpu_devices(topology)[0])
        specs = [jax.ShapeDtypeStruct(shape, dtype, sharding=chip) for shape, dtype in arrays]
        text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*specs).compile().as_text()
        found[topology.partition(":")[0]] = text.count('custom_call_target="tpu_custom_call"')
    return found


def refused_step() -> dict:
    """The same for a batch that is too large, though it is not passed over before it is compiled."""
    with mock.patch.dict(remat.LEAST, tpu=0.0):
        return small_step(("contrastive",), 2**19)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    facts = {
        "chips": {name: len(tpu_devices(name)) for name in SLICES},
        "meshes": chips_of_meshes(),
        "rows": rows_of_hosts(),
        "two_slices": slices_of_data(),
        "step": small_step(tuple(sys.argv[2:])),
        "refused": refused_step(),
        "kernels": kernels(),
    }
    Path(sys.argv[1]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
