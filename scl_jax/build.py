"""Config → model, task and optimizer: the one place where options become plain arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from scl_jax.models.fusion import FusionConfig
from scl_jax.models.layers import Precision
from scl_jax.models.parameters import Params
from scl_jax.models.scl import SCL, SCLConfig
from scl_jax.models.text import TextConfig
from scl_jax.models.vision import VisionConfig
from scl_jax.objectives.masks import MaskSpec
from scl_jax.objectives.views import OBJECTIVES
from scl_jax.partition import on_mesh
from scl_jax.task_config import HEADS
from scl_jax.tasks.entailment import Entailment
from scl_jax.tasks.nlvr2 import Statements
from scl_jax.tasks.pretrain import Pretraining, Ramp
from scl_jax.tasks.retrieval import Retrieval
from scl_jax.tasks.task import Task
from scl_jax.tasks.vqa import QuestionAnswering
from scl_jax.training import sharding
from scl_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from scl_jax.training.state import TrainState, plan_state, state_shardings
from scl_jax.training.step import make_step
from scl_jax.types import Batch


def model_config(config: ConfigDict, param_dtype: Any = jnp.float32) -> SCLConfig:
    """Sizes and types of the network."""
    m = for_platform(config, jax.default_backend()).model
    shared = {"remat": remat(config), "unroll": m.unroll, "attention": m.attention}
    rates = {"dropout": m.dropout, "attention_dropout": m.attention_dropout}
    return SCLConfig(
        vision=VisionConfig(**m.vision, **shared),
        text=TextConfig(**m.text, **shared, **rates),
        fusion=FusionConfig(**m.fusion, **shared, **rates, token_types=3 if config.task == "nlvr2" else 2),
        projection_width=m.projection_width,
        initial_temperature=m.initial_temperature,
        precision=Precision(
            jnp.dtype(m.dtype),
            param_dtype,
            m.initializer_range,
            kernels=m.attention == "fused",
            units=units(m.dtype) if m.attention == "by_head" else "",
        ),
        heads=HEADS[config.task],
        answers=m.answers,
    )


def attention(config: ConfigDict) -> str:
    """The `implementation` of `models/attention.py:attend`: "auto" takes what suits the platform."""
    return for_platform(config, jax.default_backend()).model.attention


def remat(config: ConfigDict) -> str:
    """What the layers compute again in the backward pass; "auto" is resolved by `remat.py` where there is one."""
    return "none" if config.model.remat == "auto" else config.model.remat


def for_platform(config: ConfigDict, platform: str) -> ConfigDict:
    """The config with `model.attention` and `model.unroll` chosen for a platform where they are left open.

    Our kernels for attention compute in bfloat16. A loop over layers writes all that the backward pass needs into
    stacks, and reads it back: on GPUs and TPUs all layers stand in a row, except where `model.remat` leaves little to
    stack ("full"), since a loop compiles sooner.
    """
    config = config.copy_and_resolve_references()
    m = config.model
    if m.attention == "auto":
        kernels = {"gpu": "fused", "tpu": "mosaic"} if m.dtype == "bfloat16" else {}
        m.attention = kernels.get(platform, "by_head" if platform == "cpu" else "xla")
    if m.unroll == 0:
        in_a_row = platform in ("gpu", "tpu") and remat(config) != "full"
        m.unroll = max(m[part].layers for part in ("vision", "text", "fusion")) if in_a_row else 1
    return config


def units(dtype: str, information: Path = Path("/proc/cpuinfo")) -> str:
    """What multiplies this type on this machine's processor: `Precision.units`, "" where it is nothing special."""
    features = information.read_text() if information.exists() else ""
    name, feature = {"bfloat16": ("amx", "amx_bf16"), "float32": ("avx512", "avx512f")}.get(dtype, ("", ""))
    return name if feature in features else ""


# What XLA is told for a GPU (benchmarks/RESULTS.md has what each does). Small products with the same weights are not
# joined, since joining copies the large ones. Numbers are rounded where the types say so, not kept in float32 and
# written twice. Products are cuBLAS's: trying dozens of Triton's for each makes compilation take minutes.
GPU_OPTIONS = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_allow_excess_precision": False,
    "xla_gpu_enable_triton_gemm": False,
}


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Options of XLA for the devices of a mesh; they go before XLA_FLAGS."""
    return GPU_OPTIONS if mesh.devices.flat[0].platform in ("gpu", "cuda") else None


def model_maker(config: ConfigDict) -> partial[SCL]:
    """A function that makes the model from random generators."""
    return partial(SCL, model_config(config))


def pretraining(config: ConfigDict, vocab_size: int, mask_id: int) -> Pretraining:
    """The pre-training task; `vocab_size` and `mask_id` are the tokenizer's, the model's table may have more rows."""
    o, old = config.objectives, config.reference_behaviour
    return Pretraining(
        ramps={name: Ramp(o[name].weight, o[name].start, o[name].ramp) for name in OBJECTIVES},
        masks=MaskSpec(
            vocab_size=vocab_size,
            mask_id=mask_id,
            drop_ratio=o.global_vision.drop_ratio,
            replace_ratio=o.local_vision.replace_ratio,
            language_ratio=o.masked_language.mask_ratio,
            text_ratio=o.text_mask_ratio,
            group_size=o.group_size,
            hard_negatives=o.matching.hard_negatives,
        ),
        patch_size=config.model.vision.patch_size,
        global_temperature={name: o[name].temperature for name in ("global_vision", "global_text")},
        local_temperature={name: o[name].temperature for name in ("local_vision", "local_text")},
        temperature_range=temperature_range(config),
        norm_over_frames=old.video_completion_norm_over_frames,
    )


def temperature_range(config: ConfigDict) -> tuple[float, float] | None:
    """Where the learned temperature is kept; None: anywhere."""
    bounds = config.objectives.contrastive
    unbounded = config.reference_behaviour.unbounded_temperature
    return None if unbounded else (bounds.temperature_min, bounds.temperature_max)


def task(config: ConfigDict, vocab_size: int, mask_id: int) -> Task:
    """What is trained; `vocab_size` and `mask_id` are the tokenizer's."""
    match config.task:
        case "vqa":
            return QuestionAnswering()
        case "nlvr2":
            return Statements()
        case "entailment":
            return Entailment()
        case "retrieval":
            return Retrieval(
                **config.retrieval,
                temperature_range=temperature_range(config),
                first_image_only=config.reference_behaviour.first_image_contrastive,
            )
    return pretraining(config, vocab_size, mask_id)


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """Options of the optimizer."""
    old = config.reference_behaviour
    return OptimizerConfig(
        **config.optimizer,
        decay_like_reference=old.decay_norms_and_temperature,
        adam_eps_uncorrected=old.adam_eps_uncorrected,
        rank_head_like_encoders=old.rank_head_like_encoders,
    )


def optimizer_maker(config: ConfigDict) -> Callable[[Params], optax.GradientTransformationExtraArgs]:
    """A function that makes the optimizer for a tree of parameters."""
    options = optimizer_config(config)
    return lambda params: make_optimizer(options, config.train.steps, params)


def schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate by step."""
    return make_schedule(optimizer_config(config), config.train.steps)


def has_dropout(config: ConfigDict) -> bool:
    """Whether training drops anything."""
    return config.model.dropout > 0 or config.model.attention_dropout > 0


def train_step(
    config: ConfigDict,
    task: Task,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    mesh: Mesh,
) -> Any:
    """The jitted step (state, batch, active objectives) → (state, metrics); `state` may be shapes.

    The state is donated and keeps its layout.
    """
    step = make_step(
        task,
        graph,
        tx,
        schedule(config),
        seed=config.seed,
        accumulate=config.train.accumulate,
        dropout=has_dropout(config),
        ema=config.optimizer.ema,
    )
    layout = state_shardings(tx, state.params, mesh, state.ema is not None)
    return jax.jit(
        on_mesh(mesh, step),
        static_argnums=2,
        donate_argnums=0,
        in_shardings=(layout, sharding.batch_sharding(mesh)),
        out_shardings=(layout, sharding.replicated(mesh)),
        compiler_options=compiler_options(mesh),
    )


def batch_shapes(config: ConfigDict, stream: str, mesh: Mesh) -> Batch:
    """The global batch of a stream as shapes, split over the mesh, with the targets of the config's task."""
    s, length = config.data[stream], config.data.text_length
    split = sharding.batch_sharding(mesh)

    def rows(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((s.batch_size, *shape), dtype, sharding=split)

    pixels = rows(jnp.uint8, s.frames, s.image_size, s.image_size, 3)
    targets: dict[str, dict[str, Any]] = {
        "vqa": {"answer_scores": rows(jnp.float32, config.model.answers)},
        "nlvr2": {"label": rows(jnp.int32), "second_pixels": pixels},
        "entailment": {"label": rows(jnp.int32)},
    }
    return Batch(
        pixels=pixels,
        token_ids=rows(jnp.int32, length),
        token_mask=rows(jnp.bool_, length),
        word_ids=rows(jnp.int32, length),
        weight=rows(jnp.float32),
        item_id=rows(jnp.int32),
        **targets.get(config.task, {}),
    )


def planned_step(
    config: ConfigDict, task: Task, stream: str, mesh: Mesh
) -> tuple[Any, tuple[TrainState, Batch, tuple[str, ...]]]:
    """The jitted step of a stream and its arguments as shapes, with every loss of the last step: ready to compile."""
    graph, tx, state = plan_state(model_maker(config), optimizer_maker(config), mesh, config.optimizer.ema > 0)
    arguments = (state, batch_shapes(config, stream, mesh), task.active(config.train.steps))
    return train_step(config, task, graph, tx, state, mesh), arguments
