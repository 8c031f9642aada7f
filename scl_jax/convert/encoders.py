"""Initial encoders for pre-training: CLIP's ViT and RoBERTa, under the names that they are published with.

CLIP comes as OpenAI's archive (`visual.*`, TorchScript or state_dict) or as Hugging Face's CLIPModel or
CLIPVisionModel; RoBERTa as RobertaModel or RobertaForMaskedLM. The last block of the ViT is dropped (METHOD section 1).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from scl_jax.convert.rules import (
    CONV,
    FUSED_BIAS,
    FUSED_KERNEL,
    TRANSPOSE,
    ConversionError,
    Drop,
    Report,
    Rule,
    text_rules,
    torch_to_flax,
    vision_rules,
)

Shapes = Mapping[str, tuple[int, ...]]
_TABLES = {  # tables whose rows may be of another number than the model's: adapt.py fits them
    "vision.position_embedding": r"(.*\.)?(positional_embedding|position_embedding\.weight)",
    "text.position_embedding.embedding": r"(.*\.)?embeddings\.position_embeddings\.weight",
}


def clip_rules(prefix: str) -> list[Rule]:
    """Hugging Face's names of CLIP's ViT; `prefix` is "" or "vision_model."."""

    def pair(torch: str, flax: str, weight: str) -> list[Rule]:
        transform = {"transform": TRANSPOSE} if weight == "kernel" else {}
        names = (f"{prefix}{torch}.weight",), (f"{prefix}{torch}.bias",)
        return [Rule(names[0], f"{flax}.{weight}", **transform), Rule(names[1], f"{flax}.bias")]

    layer, each = "encoder.layers.{i}", "vision.blocks.each"
    projections = [f"{prefix}{layer}.self_attn.{part}_proj" for part in "qkv"]
    return [
        Rule((f"{prefix}embeddings.patch_embedding.weight",), "vision.patch_embedding.kernel", CONV),
        Rule((f"{prefix}embeddings.class_embedding",), "vision.class_embedding"),
        Rule((f"{prefix}embeddings.position_embedding.weight",), "vision.position_embedding"),
        *pair("pre_layrnorm", "vision.norm_pre", "scale"),  # the spelling is theirs
        *pair("post_layernorm", "vision.norm_post", "scale"),
        *pair(f"{layer}.layer_norm1", f"{each}.norm_1", "scale"),
        *pair(f"{layer}.layer_norm2", f"{each}.norm_2", "scale"),
        Rule(tuple(f"{name}.weight" for name in projections), f"{each}.attention.qkv.kernel", FUSED_KERNEL),
        Rule(tuple(f"{name}.bias" for name in projections), f"{each}.attention.qkv.bias", FUSED_BIAS),
        *pair(f"{layer}.self_attn.out_proj", f"{each}.attention.out", "kernel"),
        *pair(f"{layer}.mlp.fc1", f"{each}.mlp.up", "kernel"),
        *pair(f"{layer}.mlp.fc2", f"{each}.mlp.down", "kernel"),
    ]


CLIP_DROPS = [
    Drop(r"(text_model\..*|text_projection(\.weight)?)", "CLIP's text encoder: RoBERTa takes its place"),
    Drop(r"(transformer\..*|token_embedding\.weight|positional_embedding|ln_final\..*)", "CLIP's text encoder"),
    Drop(r"(visual_projection\.weight|visual\.proj)", "CLIP's projection: the contrastive head is trained anew"),
    Drop(r"logit_scale", "CLIP's temperature: the contrastive head has its own"),
    Drop(r"(.*\.)?position_ids|input_resolution|context_length|vocab_size", "a buffer of constants"),
]
ROBERTA_DROPS = [
    Drop(r"lm_head\..*", "RoBERTa's language head: tied to its embeddings, SCL's head is not and is trained anew"),
    Drop(r"(roberta\.)?pooler\..*", "RoBERTa's pooler, unused by SCL"),
    Drop(r"(roberta\.)?embeddings\.(position_ids|token_type_ids)", "a buffer of constants"),
]


def read_clip(tensors: Mapping[str, np.ndarray], shapes: Shapes) -> tuple[dict[str, np.ndarray], Report]:
    """CLIP's ViT → the parameters `vision.*` of a model with `shapes`; position rows as many as the weights have.

    The temporal rows are zeros, so that a frame is encoded as CLIP encodes an image; the mask vector stays as it is.

    Raises:
        ConversionError: these are no CLIP weights, or they do not fit; names every key.
    """
    if "visual.conv1.weight" in tensors:
        rules, block = vision_rules("visual"), r"visual\.transformer\.resblocks"
    else:
        prefix = "vision_model." if "vision_model.embeddings.class_embedding" in tensors else ""
        if f"{prefix}embeddings.patch_embedding.weight" not in tensors:
            raise ConversionError(_not("a CLIP ViT", tensors))
        rules, block = clip_rules(prefix), re.escape(prefix) + r"encoder\.layers"
    wanted = {path: shape for path, shape in shapes.items() if path in {rule.flax for rule in rules}}
    last = wanted["vision.blocks.each.norm_1.scale"][0]
    drops = [*CLIP_DROPS, Drop(rf"{block}\.{last}\..*", "CLIP's last block: SCL uses the output of the one before")]
    parameters, report = torch_to_flax(tensors, _as_long(wanted, tensors), rules=rules, drops=drops)
    parameters["vision.temporal_embedding"] = np.zeros(shapes["vision.temporal_embedding"], np.float32)
    report.untouched = ["vision.mask_embedding"]
    return parameters, report


def read_roberta(tensors: Mapping[str, np.ndarray], shapes: Shapes) -> tuple[dict[str, np.ndarray], Report]:
    """RoBERTa → the parameters `text.*` of a model with `shapes`; position rows as many as the weights have.

    Raises:
        ConversionError: these are no RoBERTa weights, or they do not fit; names every key.
    """
    prefix = "roberta." if "roberta.embeddings.word_embeddings.weight" in tensors else ""
    if f"{prefix}embeddings.word_embeddings.weight" not in tensors:
        raise ConversionError(_not("a RoBERTa", tensors))
    rules = [
        dataclasses.replace(rule, torch=tuple(prefix + name.removeprefix("roberta.") for name in rule.torch))
        for rule in text_rules("roberta")
    ]
    wanted = {path: shape for path, shape in shapes.items() if path.startswith("text.")}
    return torch_to_flax(tensors, _as_long(wanted, tensors), rules=rules, drops=ROBERTA_DROPS)


def _as_long(shapes: Shapes, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """`shapes` with as many position rows as the tensors have."""
    own = dict(shapes)
    for path, pattern in _TABLES.items():
        for name, value in tensors.items():
            own_side = name.startswith(("visual.", "vision_model.", "embeddings.", "roberta."))
            if path in own and own_side and re.fullmatch(pattern, name) and value.ndim == 2:
                own[path] = (value.shape[0], *own[path][1:])
    return own


def _not(what: str, tensors: Mapping[str, np.ndarray]) -> str:
    return f"not {what}: {len(tensors)} tensors, the first are {', '.join(sorted(tensors)[:5])}"
