"""Does the attention kernel for TPUs give plain attention's numbers where it is to run? Asked before training there.

The kernel was compiled by the TPU compiler and run as ordinary operations, but never on a TPU by its authors. So the
first chip that it meets compares: two samples of odd lengths, padded keys, dropout, output and gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scl_jax.models.attention import plain_attention
from scl_jax.models.mosaic_attention import mosaic_attention

TOLERANCE = 0.02  # of the norm; either way is within 0.004 of float32, one weight that only one drops makes 0.1


def attention_error(interpret: bool = False) -> float:
    """The largest distance of the kernel's output and gradients in bfloat16 from plain attention's in float32.

    Relative to the norm of the latter. interpret: the kernel as ordinary operations, for tests without a TPU.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = (65, 70, 70, 65)
    arrays = [jax.random.normal(key, (2, n, 4, 64), jnp.bfloat16) for key, n in zip(keys, lengths, strict=True)]
    mask = jnp.arange(70) < jnp.array([70, 33])[:, None]

    def run(attention, arrays):
        *qkv, weight = arrays
        y, pull = jax.vjp(attention, *qkv)
        return y, *pull(weight)

    def ours(query, key, value):
        return mosaic_attention(query, key, value, mask, 0.1, keys[0], interpret)

    def plain(query, key, value):
        return plain_attention(0.1, query, key, value, mask, keys[0])

    found = jax.jit(lambda *arrays: run(ours, arrays))(*arrays)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(lambda *arrays: run(plain, arrays))(*(x.astype(jnp.float32) for x in arrays))

    def distance(x, y):
        return jnp.linalg.norm((x.astype(jnp.float32) - y).ravel()) / jnp.linalg.norm(y.ravel())

    return max(float(distance(x, y)) for x, y in zip(found, expected, strict=True))


def attention_problems(interpret: bool = False) -> list[str]:
    """What keeps the kernel from being used here, as a line for the user; nothing if it is right."""
    error = attention_error(interpret)
    if error <= TOLERANCE:
        return []
    return [
        f"model.attention: on this {jax.devices()[0].device_kind} the attention kernel is {error:.3f} of the norm away "
        f"from plain attention, at most {TOLERANCE} is rounding; set model.attention=xla, and please report it"
    ]
