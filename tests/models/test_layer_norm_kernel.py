"""The kernel of LayerNorm's backward pass, run as ordinary operations, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.models.layer_norm_kernel import PROGRAMS, ROWS, layer_norm_gradients
from scl_jax.models.layers import layer_norm_backward, layer_norm_forward
from scl_jax.partition import on_mesh
from scl_jax.training.sharding import batch_sharding, make_mesh, replicated


def both(x, gradient, scale, gradients=layer_norm_gradients):
    """Gradients by the kernel and by the plain way."""
    _, kept = layer_norm_forward(x, scale, 0 * scale, 1e-5, None, False)
    x, mean, inverse, scale = kept
    ours = gradients(x, gradient, mean, inverse, scale, interpret=True)
    return ours, layer_norm_backward(1e-5, None, False, kept, gradient)


def arrays(*shape):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, shape, shape[-1:])]


@pytest.mark.parametrize("shape", [(3, 5, 24), (2, 2, 7, 16), (1, 3, 8), (3, 2 * ROWS * PROGRAMS // 3 + 1, 8)])
def test_gradients_are_those_of_the_plain_way(shape):
    for ours, plain in zip(*jax.jit(both)(*arrays(*shape)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=2e-5, atol=2e-5 * float(jnp.abs(plain).max()))


def test_devices_take_their_own_samples():
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    layout = batch_sharding(mesh)
    split = jax.jit(on_mesh(mesh, both), in_shardings=(layout, layout, replicated(mesh)))
    for ours, plain in zip(*split(*arrays(8, 3, 16)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
