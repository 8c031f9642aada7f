"""Random bits of dropout: the published generator, the right share, one mask whatever the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scl_jax.models.dropout import bernoulli, dropout, threefry_2x32


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_generator_gives_the_known_answers_of_random123(key, counter, expected):
    words = threefry_2x32(tuple(jnp.uint32(x) for x in key), *(jnp.uint32(x) for x in counter))
    assert tuple(int(word) for word in words) == expected


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
