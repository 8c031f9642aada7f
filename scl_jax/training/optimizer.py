"""AdamW with learning-rate groups and a warm-up schedule (METHOD section 5)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

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
    """√Σx² over all leaves.

    Rows are summed first, and kept apart from the sum of the rows: where XLA on a CPU joins both, a second goes into
    the vocabulary's kernel alone. And squares are kept apart from those that Adam takes of the same gradient: where XLA
    finds them to be one, it writes them all to memory.
    """

    def square(x: jax.Array) -> jax.Array:
        x = jax.lax.optimization_barrier(x)
        rows = jnp.einsum("...i,...i->...", x, x, precision="highest") if x.ndim else x * x
        return jnp.sum(jax.lax.optimization_barrier(rows))

    return jnp.sqrt(sum(map(square, jax.tree.leaves(tree)), jnp.zeros([])))


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Scales updates down to a norm of `most` where they are longer."""

    def clip(updates, _):
        norm = global_norm(updates)
        return jax.tree.map(lambda u: jnp.where(norm < most, u, u / norm.astype(u.dtype) * most), updates)

    return optax.stateless(clip)


def scale_by_adam(
    b1: float, b2: float, eps: float, eps_uncorrected: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction m̂ / (√v̂ + eps). Where the update's `finite` is false, moments and count stay as they are.

    The direction is that of the moments that are kept. The old ones are then read by their own update alone, which XLA
    makes in place; where the choice follows the direction, a step copies both.

    eps_uncorrected: add eps to √v *before* bias correction, as the reference does.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        )

    def update(updates, state, params=None, *, finite: Any = True, **_):
        del params

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        count = kept(optax.safe_increment(state.count), state.count)
        mu = kept(optax.tree.update_moment(updates, state.mu, b1, 1), state.mu)
        nu = kept(optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2), state.nu)
        if eps_uncorrected:
            scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
            direction = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        else:
            corrected = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
            direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *corrected)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(config: OptimizerConfig, steps: int, params: Params) -> optax.GradientTransformationExtraArgs:
    """The optimizer for a tree of parameters (arrays or shapes).

    Its update takes `finite`: where false, the moments stay, and what it returns is of no use. The step that the
    learning rate is read at moves on in any case: rates belong to steps, not to updates.
    """
    c = config
    flat = parameters.flatten(params)
    multipliers = parameters.unflatten({path: multiplier(path, c) for path in flat})
    decay_mask = parameters.unflatten({path: decays(path, c) for path in flat})
    return optax.chain(
        clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        scale_by_adam(c.b1, c.b2, c.eps, c.adam_eps_uncorrected),
        optax.add_decayed_weights(c.weight_decay, decay_mask),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, multipliers)),
        optax.scale_by_learning_rate(make_schedule(c, steps)),
    )
