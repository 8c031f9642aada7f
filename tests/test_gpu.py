"""On a GPU: `JAX_PLATFORMS=cuda,cpu pytest -m gpu`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from flax import nnx

from scl_jax import build
from scl_jax.benchmark.step import matmul_peak, peak_memory
from scl_jax.benchmark.workload import Training, complete, random_arrays
from scl_jax.models import parameters
from scl_jax.models.attention import attend
from scl_jax.objectives.views import OBJECTIVES
from scl_jax.types import Batch

pytestmark = pytest.mark.gpu


def config(**changes):
    c = toy_run.config(Path(), **changes)
    c.model.text.vocab_size = 60
    return c


def losses_on(device, stream: str) -> dict[str, float]:
    """The seven losses of a random batch, dropout off, in float32 without TF32."""
    c = complete(config(**{"model.dropout": 0.0, "model.attention_dropout": 0.0}), stream, 16)
    task = build.pretraining(c, c.model.text.vocab_size, mask_id=4)
    graph, _ = parameters.abstract(build.model_maker(c))
    batch = Batch(**{name: jnp.asarray(x) for name, x in random_arrays(c, stream, 16).items()})

    def losses(batch):
        _, params = parameters.split(build.model_maker(c)(nnx.Rngs(0)))
        masks = task.draw_masks(batch, jax.random.key(1))
        outputs = task.features(parameters.merge(graph, params), batch, masks, OBJECTIVES, None)
        return {n: x.mean() for n, x in (outputs.losses | task.whole_batch_losses(outputs.whole_batch)).items()}

    with jax.default_matmul_precision("highest"):
        return {n: float(x) for n, x in jax.jit(losses)(jax.device_put(batch, device)).items()}


@pytest.mark.parametrize("stream", ["images", "videos"])
def test_losses_are_those_of_a_cpu(stream):
    gpu, cpu = losses_on(jax.devices("gpu")[0], stream), losses_on(jax.devices("cpu")[0], stream)
    assert gpu.keys() == set(OBJECTIVES)
    for name, value in cpu.items():
        np.testing.assert_allclose(gpu[name], value, rtol=1e-4, err_msg=name)


SHAPES = [(325, 325, (325, 325)), (196, 197, (197, 197)), (325, 50, (50, 7)), (50, 325, (325, 325)), (49, 49, (49, 1))]


def attention_and_gradients(implementation: str, queries: int, keys: int, real, **options):
    rng = np.random.default_rng(0)
    shapes = [(2, n, 12, 64) for n in (queries, keys, keys, queries)]
    *inputs, weight = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    mask = jnp.arange(keys) < jnp.array(real)[:, None]

    def loss(query, key, value):
        y = attend(query, key, value, mask, implementation=implementation, **options)
        return jnp.sum((y * weight).astype(jnp.float32)), y

    gradient, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return [np.asarray(x.astype(jnp.float32)) for x in (*gradient, y)]


@pytest.mark.parametrize(("queries", "keys", "real"), SHAPES)
def test_cudnn_attention_is_plain_attention_to_the_digits_of_bfloat16(queries, keys, real):
    results = [attention_and_gradients(name, queries, keys, real) for name in ("cudnn", "xla")]
    for ours, plain in zip(*results, strict=True):
        np.testing.assert_allclose(ours, plain, atol=0.02 * np.abs(plain).max())


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize(("queries", "keys", "real"), SHAPES)
def test_the_attention_kernel_drops_the_same_weights_as_plain_attention(queries, keys, real, rate):
    options = {"dropout_rate": rate, "dropout_key": jax.random.key(3)}
    results = [attention_and_gradients(name, queries, keys, real, **options) for name in ("fused", "xla")]
    for ours, plain in zip(*results, strict=True):
        assert np.linalg.norm(ours - plain) < 6e-3 * np.linalg.norm(plain)  # one other mask of 10 %: 0.3


def test_a_step_in_bfloat16_has_finite_losses():
    training = Training(complete(config(**{"model.dtype": "bfloat16"}), "images", 16), "images")
    for _ in range(3):
        metrics = training.run()
    assert all(np.isfinite(value) for value in jax.device_get(metrics).values())
    assert peak_memory() > 0


def test_the_matrix_peak_of_a_gpu_is_above_ten_teraflops():
    assert matmul_peak("bfloat16", repeats=2) > 1e13
