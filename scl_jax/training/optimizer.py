"""AdamW with learning-rate groups and a warm-up schedule (METHOD section 5)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from scl_jax.models import parameters
from scl_jax.models.parameters import Params

HEADS = r"(masked_language|matching|vqa|nlvr2|entailment|rank)\..*"
FUSION = r"fusion\.(?!token_type).*"
# embeddings and single rows that are added to tokens; word embeddings are the exception and decay
NO_DECAY = r".*(\.bias|\.scale|temperature|class_embedding|mask_embedding|token_type)" + (
    r"|.*\.(position|temporal)_embedding(\.embedding)?|text\.segment_embedding\.embedding"
)
# where names match the reference's list of exceptions (METHOD section 8, item 8)
REFERENCE_NO_DECAY = r".*\.bias|(text|fusion|masked_language)\..*\.scale"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Options of the optimizer; `warmup` is a share of the steps, or a number of steps when above 1."""

    learning_rate: float = 2e-5
    end_learning_rate: float = 0.0
    warmup: float = 0.1
    decay: str = "linear"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 0.0
    multiplier_fusion: float = 5.0
    multiplier_head: float = 5.0
    ema: float = 0.0
    decay_like_reference: bool = False
    adam_eps_uncorrected: bool = False
    rank_head_like_encoders: bool = False


def multiplier(path: str, config: OptimizerConfig) -> float:
    """The learning-rate multiplier of the parameter at a dotted path."""
    if re.fullmatch(FUSION, path):
        return config.multiplier_fusion
    if config.rank_head_like_encoders and path.startswith("rank."):
        return 1.0
    return config.multiplier_head if re.fullmatch(HEADS, path) else 1.0


def decays(path: str, config: OptimizerConfig) -> bool:
    """Whether weight decay applies to the parameter at a dotted path."""
    return not re.fullmatch(REFERENCE_NO_DECAY if config.decay_like_reference else NO_DECAY, path)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 (step 0 has rate 0), then decay to `end_learning_rate` at `steps`."""
    peak, end = config.learning_rate, config.end_learning_rate
    warmup = int(config.warmup if config.warmup > 1 else steps * config.warmup)
    rest = max(steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, end, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=end / peak if peak else 0.0),
        "constant": optax.constant_schedule(peak),
    }[config.decay]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def global_norm(tree: Any) -> jax.Array:
    """√Σx² over all leaves, each squared and summed by one product with itself: nothing but the number is stored."""
    squares = [jnp.tensordot(x, x, x.ndim, precision="highest") for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros([])))


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Scales updates down to a norm of `most` where they are longer."""

    def clip(updates, _):
        norm = global_norm(updates)
        return jax.tree.map(lambda u: jnp.where(norm < most, u, u / norm.astype(u.dtype) * most), updates)

    return optax.stateless(clip)


class AdamState(NamedTuple):
    """Moments of `scale_by_reference_adam`."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_reference_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam whose eps is added to the square root *before* bias correction, as in the reference."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamState(jnp.zeros([], jnp.int32), zeros, zeros)

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        return jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu), AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, steps: int, params: Params) -> optax.GradientTransformation:
    """The optimizer for a tree of parameters (arrays or shapes)."""
    c = config
    flat = parameters.flatten(params)
    multipliers = parameters.unflatten({path: multiplier(path, c) for path in flat})
    decay_mask = parameters.unflatten({path: decays(path, c) for path in flat})
    adam = scale_by_reference_adam if c.adam_eps_uncorrected else optax.scale_by_adam
    return optax.chain(
        clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        adam(c.b1, c.b2, c.eps),
        optax.add_decayed_weights(c.weight_decay, decay_mask),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, multipliers)),
        optax.scale_by_learning_rate(make_schedule(c, steps)),
    )
