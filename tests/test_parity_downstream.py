"""Fine-tuning computes the reference's numbers: losses, logits and every recorded gradient of VQA, NLVR2 and retrieval.

Runs on every tag in SCL_GOLDEN_DIR. Tolerances are those of golden/README.md.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import GOLDEN, GoldenCase
from safetensors.numpy import load_file

from scl_jax.convert.rules import flax_to_torch, torch_to_flax
from scl_jax.models import parameters
from scl_jax.models.fusion import IMAGE_TYPE, SECOND_IMAGE_TYPE
from scl_jax.models.heads import unit
from scl_jax.models.scl import SCL
from scl_jax.tasks.nlvr2 import Statements
from scl_jax.tasks.retrieval import Retrieval, encode_given, flat, rank_scores
from scl_jax.tasks.vqa import QuestionAnswering, joint_vector
from scl_jax.training.step import weighted_total

pytestmark = pytest.mark.parity

ACTIVATION, LOSS, GRADIENT, LOSS_64, ZERO_GRADIENT = 5e-5, 5e-5, 1e-4, 1e-7, 1e-5
HEADS = {"vqa": ("vqa",), "nlvr2": ("nlvr2",), "irtr": ("contrastive", "rank")}
ZERO = {"rank_output.bias"}  # the softmax does not see what all scores share


class Downstream:
    """A recorded task: the model with its head, the batch, and the loss as the training step computes it."""

    def __init__(self, tag: str, name: str, dtype=jnp.float32):
        self.case, self.name = GoldenCase(tag, dtype), name
        self.config = dataclasses.replace(
            self.case.model_config,
            heads=HEADS[name],
            answers=self.case.config["vqav2_label_size"],
            fusion=dataclasses.replace(self.case.model_config.fusion, token_types=3 if name == "nlvr2" else 2),
        )
        self.graph, shapes = parameters.abstract(partial(SCL, self.config))
        flat_shapes = {path: tuple(x.shape) for path, x in parameters.flatten(shapes).items()}
        extra = load_file(GOLDEN / f"{tag}_downstream.safetensors")
        if name != "nlvr2":
            extra.pop("token_type_embeddings.weight")
        known = self.case.weights | extra
        # the recording holds the weights of all tasks; `torch_to_flax` wants those of this one
        own = {key: value for key, value in known.items() if not key.startswith(self.other_heads())}
        values, report = torch_to_flax(own, flat_shapes, may_miss=self.case.absent)
        values |= {path: np.zeros(flat_shapes[path], np.float32) for path in report.untouched}
        self.params = parameters.unflatten({path: jnp.asarray(x, dtype) for path, x in values.items()})
        self.batch = self.with_targets()
        self.task = {
            "vqa": QuestionAnswering(),
            "nlvr2": Statements(),
            "irtr": Retrieval(contrastive_weight=self.case.config["con_weight"], first_image_only=True),
        }[name]

    def other_heads(self) -> tuple[str, ...]:
        torch_names = {
            "contrastive": ("language_proj", "vision_proj", "cl_temp"),
            "matching": ("itm_score",),
            "masked_language": ("mlm_score",),
            "vqa": ("vqa_classifier",),
            "nlvr2": ("nlvr2_classifier",),
            "rank": ("rank_output",),
        }
        return tuple(name for head, names in torch_names.items() if head not in self.config.heads for name in names)

    def with_targets(self):
        case, batch = self.case, self.case.batch()
        if self.name == "vqa":
            return batch.replace(answer_scores=jnp.asarray(case["in/vqa_targets"], case.dtype))
        if self.name == "nlvr2":
            return batch.replace(
                pixels=case.pixels("in/image_0"),
                second_pixels=case.pixels("in/image_1"),
                label=jnp.asarray(case["in/nlvr2_answers"]),
            )
        return batch.replace(
            other_ids=jnp.asarray(case["in/false_text_ids"]),
            other_mask=jnp.asarray(case["in/false_text_masks"].astype(bool)),
        )

    def model(self, params):
        return parameters.merge(self.graph, params)

    def total(self, params):
        """(total, the weighted mean of every loss)."""
        active, weights = self.task.active(0), self.task.weights(0)
        outputs = self.task.features(self.model(params), self.batch, None, active, None)
        losses = outputs.losses | self.task.whole_batch_losses(outputs.whole_batch)
        return weighted_total(losses, weights), {name: weights[name] * loss.mean() for name, loss in losses.items()}


LOSS_OF = {"vqa": "vqa", "nlvr2": "nlvr2", "rank": "irtr", "contrastive": "irtr_con"}  # ours → recorded
PARAMETERS_OF = {  # those that hold the recorded gradients
    "vqa": r"vqa\..*",
    "nlvr2": r"nlvr2\..*|fusion\.token_type",
    "irtr": r"rank\..*|contrastive\.temperature|contrastive\.image\.out\.kernel",
}


@pytest.mark.parametrize("name", list(HEADS))
def test_losses_activations_and_every_recorded_gradient(tag, name):
    run = Downstream(tag, name)
    every = parameters.flatten(run.params)
    wanted = {path: x for path, x in every.items() if re.fullmatch(PARAMETERS_OF[name], path)}

    def total(wanted):
        params = parameters.unflatten(every | wanted)
        value, losses = run.total(params)
        return value, (losses, activations(run, params))

    (_, (losses, computed)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(wanted)
    for ours, value in losses.items():
        assert abs(float(value) - float(run.case[f"loss/{LOSS_OF[ours]}"])) <= LOSS, ours
    recorded = {key for key in run.case.arrays.files if key.startswith((f"{name}/", f"{name}_"))}
    assert recorded == set(computed)
    for key in sorted(recorded):
        error = np.abs(np.asarray(computed[key]) - run.case[key]).max()
        assert error <= ACTIVATION, f"{key}: {error:.2e}"
    tensors = flax_to_torch({path: np.asarray(x) for path, x in gradient.items()})
    assert set(tensors) == {key.split("/", 1)[1] for key in run.case.arrays.files if key.startswith(f"grad_{name}/")}
    for key, found in tensors.items():
        expected = run.case[f"grad_{name}/{key}"]
        limit = ZERO_GRADIENT if key in ZERO else GRADIENT * np.abs(expected).max()
        assert np.abs(found - expected.reshape(found.shape)).max() <= limit, key


@pytest.mark.parametrize("name", list(HEADS))
def test_losses_in_float64(tag, name):
    """float32 does not see a wrong LayerNorm epsilon; float64 does."""
    with jax.enable_x64(True):
        run = Downstream(tag, name, jnp.float64)
        _, losses = jax.jit(run.total)(run.params)
        for ours, value in losses.items():
            assert value.dtype == jnp.float64
            assert abs(float(value) - float(run.case[f"loss64/{LOSS_OF[ours]}"])) <= LOSS_64, ours


def activations(run: Downstream, params) -> dict:
    """What is recorded of the task besides losses, under its recorded names."""
    model, batch, frames = run.model(params), run.batch, run.batch.pixels.shape[1]
    if run.name == "vqa":
        return {"vqa/logits": run.task.logits(model, batch), "vqa/cls_feats": joint_vector(model, batch)}
    if run.name == "nlvr2":
        out = {"nlvr2/logits": run.task.logits(model, batch)}
        text = model.encode_text(batch.token_ids, batch.token_mask)
        for number, pixels in enumerate((batch.pixels, batch.second_pixels)):
            image_type = (IMAGE_TYPE, SECOND_IMAGE_TYPE)[number]
            fused = model.fuse(text, batch.token_mask, model.encode_image(pixels), frames, image_type=image_type)
            pooled = model.fusion.pool(fused)
            out |= dict(zip((f"nlvr2_{number + 1}/pool_text", f"nlvr2_{number + 1}/pool_image"), pooled, strict=True))
        return out
    image = model.encode_image(batch.pixels)
    text, mask = encode_given(model, batch, None)
    words, pictures = model.project_text(flat(text)), model.project_image(image, frames)
    fused = model.fuse(flat(text), flat(mask), jnp.repeat(image, mask.shape[1], axis=0), frames)
    pooled = dict(zip(("irtr/pool_text", "irtr/pool_image"), model.fusion.pool(fused), strict=True))
    return pooled | {
        "irtr/rank_scores": rank_scores(model, text, mask, image, frames),
        "irtr/proj_text": words,
        "irtr/proj_image": pictures[:1],
        "irtr/sim_con": unit(pictures[:1]) @ unit(words).T,
    }
