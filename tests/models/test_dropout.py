"""Random bits of dropout: evenly mixed, the right share, one mask whatever the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scl_jax.models.dropout import bernoulli, dropout, mix
from scl_jax.models.layers import Precision, Residual


def test_a_changed_bit_changes_every_bit_half_the_time():
    x = jax.random.bits(jax.random.key(0), (4000,), jnp.uint32)
    for flipped in range(32):
        changed = np.asarray(mix(x) ^ mix(x ^ jnp.uint32(1 << flipped)))
        shares = [(changed >> bit & 1).mean() for bit in range(32)]
        assert min(shares) > 0.45 and max(shares) < 0.55


@pytest.mark.parametrize("probability", [0.9, 0.5])
def test_the_share_is_right_in_every_row_and_column(probability):
    keep = np.asarray(jax.jit(lambda key: bernoulli(key, probability, (400, 5, 300)))(jax.random.key(3)), np.float64)
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(keep.mean() - probability) < 4 * deviation / keep.size**0.5
    for axes in ((1, 2), (0, 1), (0, 2)):
        means = keep.mean(axis=axes)
        assert np.abs(means - probability).max() < 5 * deviation / (keep.size / means.size) ** 0.5
    flat = keep.reshape(400, -1) - probability
    for one, other in ((flat[:-1], flat[1:]), (flat[:, :-1], flat[:, 1:])):  # neighbours know nothing of each other
        assert abs((one * other).mean()) < 5 * deviation**2 / one.size**0.5


def test_keys_differ_and_repeat():
    draw = jax.jit(lambda key: bernoulli(key, 0.5, (64, 64)))
    one, again, two = (np.asarray(draw(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert 0.45 < (one == two).mean() < 0.55
    for shift in range(1, 64):  # no row is another row moved on, of this key or of the other
        for other in (one, two):
            assert np.abs((one == np.roll(other, shift, axis=0)).mean(axis=1) - 0.5).max() < 0.35


def test_a_mask_does_not_depend_on_the_devices():
    layout = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    x = jnp.ones((16, 3, 7))
    alone = jax.jit(lambda x: dropout(x, 0.3, jax.random.key(5)))(x)
    split = jax.jit(lambda x: dropout(x, 0.3, jax.random.key(5)), out_shardings=layout)(jax.device_put(x, layout))
    np.testing.assert_array_equal(split, alone)
    assert set(np.unique(np.asarray(alone))) == {np.float32(0), np.float32(1 / 0.7)}


def test_without_a_key_or_a_rate_nothing_is_dropped():
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_a_residual_drops_of_the_update_alone():
    residual, x = Residual(8, 1e-5, 0.5, Precision(), nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (4, 8))
    same = residual(x, jnp.zeros_like(x), jax.random.key(0))
    np.testing.assert_array_equal(same, residual(x, jnp.zeros_like(x), None))
    assert (residual(x, x, jax.random.key(0)) != residual(x, x, None)).any()
