import jax
import jax.numpy as jnp

from scl_jax.training.flops import count_flops, peak_flops


def test_matrix_products_count_and_scans_count_every_turn():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert count_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5
    square = jnp.ones((4, 4))

    def repeated(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(lambda y: y @ square)(x), None), x, None, length=7)[0]

    assert count_flops(jax.jit(repeated), square) == 7 * 2 * 4**3


def test_the_backward_pass_of_a_product_is_two_products():
    x = jnp.ones((8, 8))
    gradient = jax.grad(lambda x, y: (x @ y).sum(), argnums=(0, 1))
    assert count_flops(gradient, x, x) in (2 * 2 * 8**3, 3 * 2 * 8**3)


def test_the_peak_of_an_unknown_device_is_none():
    assert peak_flops(jax.devices()[0]) is None
