"""A very small network with random weights, and inputs for it, for tests of the models.

Axes: B batch, F frames, P patches, N tokens a frame, L text tokens, D width.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scl_jax.models import parameters
from scl_jax.models.fusion import FusionConfig
from scl_jax.models.scl import SCL, SCLConfig
from scl_jax.models.text import TextConfig
from scl_jax.models.vision import VisionConfig

B, FRAMES, PATCHES, L, D, DEPTH = 2, 3, 16, 8, 16, 2
TOLERANCE = 1e-5
SIZES = {"width": D, "layers": DEPTH, "heads": 2, "mlp_width": 32}


def config_of(remat: str = "none", dropout: float = 0.0, attention: str = "xla") -> SCLConfig:
    shared = {**SIZES, "remat": remat, "attention": attention}
    rates = {"dropout": dropout, "attention_dropout": dropout}
    return SCLConfig(
        vision=VisionConfig(**shared, patch_size=8, image_size=32, max_frames=FRAMES),
        text=TextConfig(**shared, vocab_size=40, max_positions=20, **rates),
        fusion=FusionConfig(**shared, **rates),
        projection_width=8,
    )


@lru_cache
def params():
    """Weights of text and fusion ten times as large as at the start, so that all that they mix shows in the output."""
    state = jax.jit(lambda: parameters.split(SCL(config_of(), nnx.Rngs(0)))[1])()
    flat = parameters.flatten(state)
    scaled = {path: 10 * x if re.match("(text|fusion).*(kernel|embedding)$", path) else x for path, x in flat.items()}
    return parameters.unflatten(scaled)


def model(remat: str = "none", dropout: float = 0.0, weights=None, attention: str = "xla") -> SCL:
    graph, _ = parameters.abstract(partial(SCL, config_of(remat, dropout, attention)))
    return parameters.merge(graph, params() if weights is None else weights)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def clip(seed: int = 0) -> jax.Array:
    return random(B, FRAMES, 32, 32, 3, seed=seed)


def text() -> tuple[jax.Array, jax.Array]:
    """(token_ids, token_mask): one text of eight tokens, one of five."""
    ids = jnp.asarray([[0, 9, 8, 7, 6, 5, 9, 2], [0, 7, 9, 5, 2, 1, 1, 1]])
    return ids, ids != 1


encode = jax.jit(lambda pixels, keep=None: model().vision(pixels, keep))
encode_text = jax.jit(lambda ids, mask: model().encode_text(ids, mask))
