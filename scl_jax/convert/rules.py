"""The one table between the reference's PyTorch names and this library's parameters, and its interpreter.

A torch name may hold `{i}`: the layer number; the layers of one rule are stacked on a leading axis. Loading is total:
every torch key is used, dropped by a rule with a reason, or an error; every parameter is filled, or the caller said
which may stay as they were.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from functools import cache

import numpy as np

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How the torch tensors of one rule become one parameter of shape `shape`, and back, bit by bit."""

    to_flax: Callable[[Arrays, tuple[int, ...]], np.ndarray]
    to_torch: Callable[[np.ndarray], Arrays]


def _split_fused_kernel(kernel: np.ndarray) -> Arrays:
    """(D, parts, H, d) → `parts` matrices (H·d, D)."""
    width, parts = kernel.shape[:2]
    flat = kernel.reshape(width, parts, -1)
    return [np.ascontiguousarray(flat[:, part].T) for part in range(parts)]


def _patch_kernel_to_conv(kernel: np.ndarray) -> Arrays:
    """(size·size·3, D) → (D, 3, size, size)."""
    size = round((kernel.shape[0] / 3) ** 0.5)
    return [np.ascontiguousarray(kernel.reshape(size, size, 3, -1).transpose(3, 2, 0, 1))]


COPY = Transform(lambda t, shape: t[0].reshape(shape), lambda p: [p])
ROW = Transform(lambda t, shape: t[0].reshape(shape), lambda p: [p[None]])  # (1, …) ↔ (…)
TRANSPOSE = Transform(lambda t, shape: t[0].T, lambda p: [np.ascontiguousarray(p.T)])
CONV = Transform(lambda t, shape: t[0].transpose(2, 3, 1, 0).reshape(shape), _patch_kernel_to_conv)
FUSED_KERNEL = Transform(
    lambda t, shape: np.stack([x.T for x in t], axis=1).reshape(shape),
    _split_fused_kernel,
)
FUSED_BIAS = Transform(
    lambda t, shape: np.stack(t).reshape(shape), lambda p: [p[part].reshape(-1) for part in range(p.shape[0])]
)
STACKED_KERNEL = Transform(  # CLIP keeps q, k, v in one tensor
    lambda t, shape: t[0].T.reshape(shape), lambda p: [np.ascontiguousarray(p.reshape(p.shape[0], -1).T)]
)
STACKED_BIAS = Transform(lambda t, shape: t[0].reshape(shape), lambda p: [p.reshape(-1)])


@dataclasses.dataclass(frozen=True)
class Rule:
    """Torch names ↔ one parameter path (dotted)."""

    torch: tuple[str, ...]
    flax: str
    transform: Transform = COPY


@dataclasses.dataclass(frozen=True)
class Drop:
    """Torch names (a regular expression) that are left out, and why."""

    torch: str
    reason: str


def _linear(torch: str, flax: str) -> list[Rule]:
    return [Rule((f"{torch}.weight",), f"{flax}.kernel", TRANSPOSE), Rule((f"{torch}.bias",), f"{flax}.bias")]


def _norm(torch: str, flax: str) -> list[Rule]:
    return [Rule((f"{torch}.weight",), f"{flax}.scale"), Rule((f"{torch}.bias",), f"{flax}.bias")]


def _projections(torch: tuple[str, ...], flax: str) -> list[Rule]:
    return [
        Rule(tuple(f"{name}.weight" for name in torch), f"{flax}.kernel", FUSED_KERNEL),
        Rule(tuple(f"{name}.bias" for name in torch), f"{flax}.bias", FUSED_BIAS),
    ]


def _bert_layer(torch: str, flax: str, cross: bool) -> list[Rule]:
    """A post-LN layer of RoBERTa or of one fusion stream."""

    def names(attention: str, *parts: str) -> tuple[str, ...]:
        return tuple(f"{torch}.{attention}.self.{part}" for part in parts)

    rules = _projections(names("attention", "query", "key", "value"), f"{flax}.attention.qkv")
    rules += _linear(f"{torch}.attention.output.dense", f"{flax}.attention.out")
    rules += _norm(f"{torch}.attention.output.LayerNorm", f"{flax}.attention.residual.norm")
    if cross:
        rules += _projections(names("crossattention", "query"), f"{flax}.cross_attention.query")
        rules += _projections(names("crossattention", "key", "value"), f"{flax}.cross_attention.key_value")
        rules += _linear(f"{torch}.crossattention.output.dense", f"{flax}.cross_attention.out")
        rules += _norm(f"{torch}.crossattention.output.LayerNorm", f"{flax}.cross_attention.residual.norm")
    rules += _linear(f"{torch}.intermediate.dense", f"{flax}.mlp.up")
    rules += _linear(f"{torch}.output.dense", f"{flax}.mlp.down")
    return rules + _norm(f"{torch}.output.LayerNorm", f"{flax}.mlp_residual.norm")


def vision_rules(torch: str = "vision_transformer.visual") -> list[Rule]:
    """CLIP's ViT under the prefix `torch` (OpenAI names)."""
    block, each = f"{torch}.transformer.resblocks.{{i}}", "vision.blocks.each"
    return [
        Rule((f"{torch}.conv1.weight",), "vision.patch_embedding.kernel", CONV),
        Rule((f"{torch}.class_embedding",), "vision.class_embedding"),
        Rule((f"{torch}.positional_embedding",), "vision.position_embedding"),
        *_norm(f"{torch}.ln_pre", "vision.norm_pre"),
        *_norm(f"{torch}.ln_post", "vision.norm_post"),
        *_norm(f"{block}.ln_1", f"{each}.norm_1"),
        *_norm(f"{block}.ln_2", f"{each}.norm_2"),
        Rule((f"{block}.attn.in_proj_weight",), f"{each}.attention.qkv.kernel", STACKED_KERNEL),
        Rule((f"{block}.attn.in_proj_bias",), f"{each}.attention.qkv.bias", STACKED_BIAS),
        *_linear(f"{block}.attn.out_proj", f"{each}.attention.out"),
        *_linear(f"{block}.mlp.c_fc", f"{each}.mlp.up"),
        *_linear(f"{block}.mlp.c_proj", f"{each}.mlp.down"),
    ]


def video_rules(torch: str = "vision_transformer.visual") -> list[Rule]:
    """What SCL adds to CLIP's ViT; image weights lack the first, video weights the second."""
    return [
        Rule((f"{torch}.temporal_embed",), "vision.temporal_embedding", ROW),
        Rule((f"{torch}.visual_mask_token",), "vision.mask_embedding", ROW),
    ]


def text_rules(torch: str = "text_transformer") -> list[Rule]:
    """RoBERTa under the prefix `torch` (Hugging Face names)."""
    embeddings = f"{torch}.embeddings"
    return [
        Rule((f"{embeddings}.word_embeddings.weight",), "text.word_embedding.embedding"),
        Rule((f"{embeddings}.position_embeddings.weight",), "text.position_embedding.embedding"),
        Rule((f"{embeddings}.token_type_embeddings.weight",), "text.segment_embedding.embedding"),
        *_norm(f"{embeddings}.LayerNorm", "text.norm"),
        *_bert_layer(f"{torch}.encoder.layer.{{i}}", "text.layers.each", cross=False),
    ]


def fusion_rules() -> list[Rule]:
    """The co-attention encoder."""
    return [
        *_linear("cross_modal_text_transform", "fusion.text_transform"),
        *_linear("cross_modal_image_transform", "fusion.image_transform"),
        Rule(("token_type_embeddings.weight",), "fusion.token_type"),
        *_bert_layer("cross_modal_text_layers.{i}", "fusion.layers.each.text", cross=True),
        *_bert_layer("cross_modal_image_layers.{i}", "fusion.layers.each.image", cross=True),
        *_linear("cross_modal_text_pooler.dense", "fusion.text_pooler"),
        *_linear("cross_modal_image_pooler.dense", "fusion.image_pooler"),
    ]


def _mlp_head(torch: str, flax: str) -> list[Rule]:
    """`Sequential(Linear, LayerNorm, GELU, Linear)`."""
    return [
        *_linear(f"{torch}.0", f"{flax}.dense"),
        *_norm(f"{torch}.1", f"{flax}.norm"),
        *_linear(f"{torch}.3", f"{flax}.out"),
    ]


def head_rules() -> list[Rule]:
    """Pre-training and downstream heads."""
    return [
        *_mlp_head("language_proj", "contrastive.text"),
        *_mlp_head("vision_proj", "contrastive.image"),
        Rule(("cl_temp",), "contrastive.temperature"),
        *_linear("itm_score.fc", "matching.dense"),
        *_linear("mlm_score.transform.dense", "masked_language.dense"),
        *_norm("mlm_score.transform.LayerNorm", "masked_language.norm"),
        Rule(("mlm_score.decoder.weight",), "masked_language.decoder.kernel", TRANSPOSE),
        Rule(("mlm_score.bias",), "masked_language.decoder.bias"),
        *_mlp_head("vqa_classifier", "vqa"),
        *_mlp_head("nlvr2_classifier", "nlvr2"),
        *_mlp_head("snli_classifier", "entailment"),
        *_linear("rank_output", "rank"),
    ]


RULES: list[Rule] = [*vision_rules(), *video_rules(), *text_rules(), *fusion_rules(), *head_rules()]

DROPS: list[Drop] = [
    Drop(r"text_transformer\.embeddings\.position_ids", "a buffer of constants"),
    Drop(r"text_transformer\.pooler\..*", "RoBERTa's pooler, unused by SCL"),
    Drop(r"vision_transformer\.(decoder_.*|mask_token)", "MAE decoder, unused by SCL"),
]


@cache
def _torch_shapes(transform: Transform, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the torch tensors that a parameter of `shape` is made of."""
    return tuple(tensor.shape for tensor in transform.to_torch(np.broadcast_to(np.int8(0), shape)))


class ConversionError(ValueError):
    """Weights that do not fit; the message names every key concerned."""


@dataclasses.dataclass
class Report:
    """What a conversion did with each key."""

    mapped: list[str] = dataclasses.field(default_factory=list)  # torch keys
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)  # torch key → reason
    untouched: list[str] = dataclasses.field(default_factory=list)  # parameter paths that no torch key fills


def torch_to_flax(
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rules: list[Rule] = RULES,
    drops: list[Drop] = DROPS,
    may_miss: Collection[str] = (),
) -> tuple[dict[str, np.ndarray], Report]:
    """Torch tensors → parameters by dotted path.

    Args:
        tensors: by torch name.
        shapes: the shape of every parameter of the model, by dotted path.
        may_miss: regular expressions of parameters that may be absent; they are not in the result.

    Raises:
        ConversionError: unknown torch keys, parameters that nothing fills, or shapes that do not fit.
    """
    report, parameters, problems = Report(), {}, []
    unused = set(tensors)
    for rule in rules:
        if rule.flax not in shapes:
            continue
        stacked = any("{i}" in name for name in rule.torch)
        depth = shapes[rule.flax][0] if stacked else 1
        names = [[name.format(i=i) for name in rule.torch] for i in range(depth)]
        missing = [name for layer in names for name in layer if name not in tensors]
        if missing:
            if len(missing) == depth * len(rule.torch) and _matches(rule.flax, may_miss):
                report.untouched.append(rule.flax)
            else:
                problems.append(f"missing: {', '.join(missing)} (for {rule.flax})")
            continue
        shape = tuple(shapes[rule.flax][1:] if stacked else shapes[rule.flax])
        expected = _torch_shapes(rule.transform, shape) * depth
        wrong = [
            f"shape: {name} is {tuple(tensors[name].shape)}, but {rule.flax} needs {needed}"
            for name, needed in zip([name for layer in names for name in layer], expected, strict=True)
            if tuple(tensors[name].shape) != needed
        ]
        if wrong:
            problems += wrong
            continue
        layers = [rule.transform.to_flax([np.asarray(tensors[name]) for name in layer], shape) for layer in names]
        value = np.stack(layers) if stacked else layers[0]
        parameters[rule.flax] = value
        report.mapped += [name for layer in names for name in layer]
        unused -= {name for layer in names for name in layer}
    problems += [f"no rule fills {path}" for path in sorted(set(shapes) - {rule.flax for rule in rules})]
    for name in sorted(unused):
        drop = next((drop for drop in drops if re.fullmatch(drop.torch, name)), None)
        if drop:
            report.dropped[name] = drop.reason
        elif not any(name in problem for problem in problems):
            problems.append(f"unused: {name} {tuple(tensors[name].shape)}")
    if problems:
        raise ConversionError("the weights do not fit this model:\n  " + "\n  ".join(problems))
    return parameters, report


def flax_to_torch(
    parameters: Mapping[str, np.ndarray], *, rules: list[Rule] = RULES, leave_out: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Parameters by dotted path → tensors under the reference's names.

    Raises:
        ConversionError: a parameter that no rule knows.
    """
    by_path = {rule.flax: rule for rule in rules}
    unknown = sorted(set(parameters) - set(by_path))
    if unknown:
        raise ConversionError("no rule for these parameters: " + ", ".join(unknown))
    tensors = {}
    for path, rule in by_path.items():
        if path not in parameters or _matches(path, leave_out):
            continue
        value = np.asarray(parameters[path])
        if any("{i}" in name for name in rule.torch):
            for i, layer in enumerate(value):
                tensors.update(
                    zip([name.format(i=i) for name in rule.torch], rule.transform.to_torch(layer), strict=True)
                )
        else:
            tensors.update(zip(rule.torch, rule.transform.to_torch(value), strict=True))
    return tensors


def _matches(path: str, patterns: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)
