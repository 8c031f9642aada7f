"""A recorded golden case: the model at its sizes with its weights, its inputs, and its explicit masks."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from scl_jax.convert.rules import torch_to_flax
from scl_jax.models import parameters
from scl_jax.models.fusion import FusionConfig
from scl_jax.models.layers import Precision
from scl_jax.models.scl import SCL, SCLConfig
from scl_jax.models.text import TextConfig
from scl_jax.models.vision import VisionConfig
from scl_jax.objectives.masks import Masks, MaskSpec
from scl_jax.tasks.pretrain import Pretraining, Ramp
from scl_jax.types import Batch

GOLDEN = Path(os.environ.get("SCL_GOLDEN_DIR", Path(__file__).parent / "golden"))


def golden_tags() -> list[str]:
    """Tags with arrays, weights and configuration; none is a failure, never a skip."""
    tags = [
        path.stem
        for path in sorted(GOLDEN.glob("*.npz"))
        if path.with_suffix(".safetensors").exists() and path.with_suffix(".json").exists()
    ]
    if not tags:
        raise FileNotFoundError(f"no golden case (<tag>.npz, .safetensors, .json) in {GOLDEN}; set SCL_GOLDEN_DIR")
    return tags


class GoldenCase:
    """One tag in one precision (float32, or float64 with x64 enabled)."""

    def __init__(self, tag: str, dtype=jnp.float32):
        self.tag, self.dtype = tag, dtype
        self.meta = json.loads((GOLDEN / f"{tag}.json").read_text())
        self.arrays = np.load(GOLDEN / f"{tag}.npz")
        self.is_video = self.meta["frames"] is not None
        c = self.meta["config"]
        self.config = c
        self.model_config = SCLConfig(
            vision=VisionConfig(
                width=c["hidden_size"],
                layers=c["vit_layers"] - 1,
                heads=c["vit_heads"],
                mlp_width=c["hidden_size"] * c["mlp_ratio"],
                patch_size=c["patch_size"],
                image_size=c["image_size"],
                max_frames=c.get("max_frames", 8),
            ),
            text=TextConfig(
                width=c["hidden_size"],
                layers=c["num_layers"],
                heads=c["num_heads"],
                mlp_width=c["hidden_size"] * c["mlp_ratio"],
                vocab_size=c["vocab_size"],
                max_positions=c["text_max_position"],
            ),
            fusion=FusionConfig(
                width=c["hidden_size"],
                layers=c["num_top_layer"],
                heads=c["num_heads"],
                mlp_width=c["hidden_size"] * c["mlp_ratio"],
            ),
            projection_width=c["proj_dim"],
            precision=Precision(dtype, dtype),
        )
        self.weights = load_file(GOLDEN / f"{tag}.safetensors")
        self.graph, shapes = parameters.abstract(partial(SCL, self.model_config))
        self.shapes = {path: tuple(x.shape) for path, x in parameters.flatten(shapes).items()}
        self.absent = [r"vision\.mask_embedding"] if self.is_video else [r"vision\.temporal_embedding"]
        flat, self.report = torch_to_flax(self.weights, self.shapes, may_miss=self.absent)
        for path in self.report.untouched:  # absent = zero
            flat[path] = np.zeros(self.shapes[path], np.float32)
        self.params = parameters.unflatten({path: jnp.asarray(x, dtype) for path, x in flat.items()})

    def model(self, params=None) -> SCL:
        return parameters.merge(self.graph, self.params if params is None else params)

    def pixels(self, name: str) -> jnp.ndarray:
        """(B, 3, H, W) or (B, F, 3, H, W) → (B, F, H, W, 3)."""
        x = self.arrays[name]
        x = x if x.ndim == 5 else x[:, None]
        return jnp.asarray(x.transpose(0, 1, 3, 4, 2), self.dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def batch(self) -> Batch:
        ids, mask = self["in/text_ids"], self["in/text_masks"].astype(bool)
        special = (ids == 0) | (ids == 2) | ~mask
        return Batch(
            pixels=self.pixels("in/image"),
            token_ids=jnp.asarray(ids),
            token_mask=jnp.asarray(mask),
            word_ids=jnp.asarray(np.where(special, -1, np.arange(ids.shape[1]))),
            weight=jnp.ones(len(ids), self.dtype),
            item_id=jnp.arange(len(ids)),
        )

    def masks(self) -> Masks:
        """The recorded masks. Matching takes its image from `in/false_image`, so `partner` is not used."""
        b = len(self["in/text_ids"])
        patches = (self.config["image_size"] // self.config["patch_size"]) ** 2
        if "mask/tok_mask_bool" in self.arrays:
            replaced, slots = self["mask/tok_mask_bool"], self["mask/tok_mask_idx"]
        else:
            count = int(patches * self.config["image_token_mask_ratio"])
            replaced, slots = np.arange(patches)[None].repeat(b, 0) < count, np.arange(count)[None].repeat(b, 0)
        labels = self["in/text_labels_mlm"]
        language_slots, language_valid = slots_of(labels != -100)
        completion_slots, completion_valid = slots_of(self["mask/txt_mask_bool"])
        return Masks(
            keep=jnp.asarray(self["mask/drop_ids_keep"]),
            replaced=jnp.asarray(replaced),
            replaced_slots=jnp.asarray(slots),
            language_ids=jnp.asarray(self["in/text_ids_mlm"]),
            language_slots=jnp.asarray(language_slots),
            language_valid=jnp.asarray(language_valid),
            completion_ids=jnp.asarray(self["mask/text_ids_masked"]),
            completion_slots=jnp.asarray(completion_slots),
            completion_valid=jnp.asarray(completion_valid),
            partner=jnp.arange(b),
            is_pair=jnp.asarray(self["mask/itm_labels"] == 1),
        )


def slots_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of True, left-aligned, with their validity."""
    order = np.argsort(~mask, axis=1, kind="stable")
    count = mask.sum(axis=1)
    width = max(1, count.max())
    return order[:, :width], np.arange(width)[None] < count[:, None]


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


# this library's name of a recorded loss
LOSS_NAMES = {
    "contrastive": "con",
    "matching": "itm",
    "masked_language": "mlm",
    "global_vision": "mgsc_image",
    "global_text": "mgsc_text",
    "local_vision": "mltc_image",
    "local_text": "mltc_text",
}


def golden_task(case: GoldenCase, norm_over_frames: bool = False) -> Pretraining:
    """The objectives at the recorded settings; weights as in the recorded total."""
    c = case.config
    weights = dict.fromkeys(LOSS_NAMES, 1.0)
    weights |= {"contrastive": c["con_weight"]}
    weights |= dict.fromkeys(("local_vision", "local_text"), 0.0 if case.is_video else c["local_completion_weight"])
    return Pretraining(
        ramps={name: Ramp(weight) for name, weight in weights.items()},
        masks=MaskSpec(c["vocab_size"], c["mask_token_id"], group_size=len(case["in/text_ids"])),
        patch_size=c["patch_size"],
        global_temperature=dict.fromkeys(("global_vision", "global_text"), c["completion_temperature"]),
        local_temperature=dict.fromkeys(("local_vision", "local_text"), c["completion_temperature"]),
        norm_over_frames=norm_over_frames,
    )


def golden_losses(case: GoldenCase, params, norm_over_frames: bool = False):
    """(total, losses by our names), the contrastive one weighted as recorded."""
    task = golden_task(case, norm_over_frames)
    batch = case.batch().replace(false_pixels=case.pixels("in/false_image"))
    active = task.active(0)
    outputs = task.features(case.model(params), batch, case.masks(), active, None)
    losses = outputs.losses | task.whole_batch_losses(outputs.whole_batch)
    means = {name: loss.mean() for name, loss in losses.items()}
    total = sum(task.ramps[name].weight * means[name] for name in active)
    means["contrastive"] *= case.config["con_weight"]
    return total, means
