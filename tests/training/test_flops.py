import jax
import jax.numpy as jnp
import pytest

from configs import pretrain_image
from scl_jax import build
from scl_jax.benchmark.workload import random_arrays
from scl_jax.config import finalize
from scl_jax.models import parameters
from scl_jax.partition import by_sample, on_mesh
from scl_jax.training.flops import count_flops, peak_flops
from scl_jax.training.sharding import make_mesh
from scl_jax.training.state import TrainState
from scl_jax.training.step import make_step
from scl_jax.types import Batch

REFERENCE = 1573e9  # matrix FLOPs of a sample in the authors' step, forward and backward


def test_matrix_products_count_and_scans_count_every_turn():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert count_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5
    square = jnp.ones((4, 4))

    def repeated(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(lambda y: y @ square)(x), None), x, None, length=7)[0]

    assert count_flops(jax.jit(repeated), square) == 7 * 2 * 4**3


def test_what_nobody_reads_of_a_split_program_counts_nothing():
    """As with a kernel whose backward pass reads its inputs alone, in a layer that is computed again."""

    @jax.custom_vjp
    def kernel(x):
        return by_sample(lambda x: x @ jnp.ones((3, 3)), x)

    kernel.defvjp(lambda x: (kernel(x), x), lambda x, gradient: (x + gradient,))
    layers = jax.grad(lambda x: jax.lax.scan(lambda x, _: (jax.checkpoint(kernel)(x), None), x, length=2)[0].sum())
    assert count_flops(on_mesh(make_mesh(data=8, fsdp=1, tensor=1), layers), jnp.ones((8, 3))) == 2 * 2 * 8 * 3 * 3


def test_the_backward_pass_of_a_product_is_two_products():
    x = jnp.ones((8, 8))
    gradient = jax.grad(lambda x, y: (x @ y).sum(), argnums=(0, 1))
    assert count_flops(gradient, x, x) in (2 * 2 * 8**3, 3 * 2 * 8**3)


def test_the_peak_of_an_unknown_device_is_none():
    assert peak_flops(jax.devices()[0]) is None


@pytest.mark.parametrize(
    ("remat", "most"),
    [
        ("none", 1050e9),
        pytest.param("dots", 1050e9, marks=pytest.mark.slow),
        pytest.param("full", REFERENCE, marks=pytest.mark.slow),
    ],
)
def test_the_full_size_step_costs_two_thirds_of_the_references(remat, most):
    """ViT-B/16 at 288 px, 50 tokens, all objectives: what is traced is counted, scans by their length."""
    rows = 16
    config = pretrain_image.get_config()
    config.model.update(remat=remat, attention="xla")  # as on a TPU; on a CPU logits are computed twice
    config = finalize(config, config.model.text.vocab_size)
    task = build.pretraining(config, config.model.text.vocab_size, mask_id=4)
    graph, params = parameters.abstract(build.model_maker(config))
    tx = build.optimizer_maker(config)(params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params))
    batch = jax.eval_shape(lambda: Batch(**random_arrays(config, "images", rows)))
    step = make_step(task, graph, tx, build.schedule(config), seed=0)
    flops = count_flops(step, state, batch, task.active(config.train.steps), static_argnums=(2,)) / rows
    assert 900e9 < flops < most
