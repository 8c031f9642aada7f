"""Sizes of the PyTorch model, its `config.json`, and reading them off the shapes of a checkpoint. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

HEADS = {  # head → the first part of its names
    "contrastive": "cl_temp",
    "matching": "itm_score",
    "masked_language": "mlm_score",
    "vqa": "vqa_classifier",
    "nlvr2": "nlvr2_classifier",
    "entailment": "snli_classifier",
    "rank": "rank_output",
}


@dataclasses.dataclass(frozen=True)
class SCLConfig:
    """Sizes of a model, as in `config.json`; the defaults are the published ones."""

    width: int = 768
    heads: int = 12  # of text and fusion encoder
    mlp_width: int = 3072
    vision_width: int = 768
    vision_heads: int = 12
    vision_mlp_width: int = 3072
    vision_layers: int = 11  # CLIP ViT-B/16 without its last block
    text_layers: int = 12
    fusion_layers: int = 6
    patch_size: int = 16
    image_size: int = 288  # of the position grid
    max_frames: int = 0  # temporal rows; 0: none (image weights), they count as zeros
    mask_vector: bool = True  # the learned patch of the replaced view; video weights of the authors have none
    vocab_size: int = 50265
    max_positions: int = 514
    token_types: int = 2  # 3 for pairs of images (NLVR2)
    projection_width: int = 512
    answers: int = 3129  # of visual question answering
    dropout: float = 0.1
    initial_temperature: float = 0.07
    with_heads: tuple[str, ...] = ("contrastive", "matching", "masked_language")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.with_heads) - set(HEADS))
        if unknown:
            raise ValueError(f"with_heads: unknown head {unknown[0]!r}; known are {', '.join(HEADS)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SCLConfig:
        """The configuration in a parsed `config.json`; other keys are passed over, none of ours may be missing.

        Raises:
            ValueError: a key is missing, or a head is unknown.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}: it was not written for scl_jax's PyTorch model")
        known: dict[str, Any] = {name: values[name] for name in names}
        known["with_heads"] = tuple(known["with_heads"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, ready for `json.dumps`."""
        return dataclasses.asdict(self) | {"with_heads": list(self.with_heads)}

    @classmethod
    def infer(cls, shapes: Mapping[str, Sequence[int]], head_width: int = 64) -> SCLConfig:
        """The sizes that the `shapes` of a checkpoint imply; it does not show the width of an attention head."""
        vision, text = "vision_transformer.visual.", "text_transformer."
        needed = {  # name → its number of axes
            vision + "conv1.weight": 4,
            vision + "positional_embedding": 2,
            vision + "transformer.resblocks.0.mlp.c_fc.weight": 2,
            text + "embeddings.word_embeddings.weight": 2,
            text + "embeddings.position_embeddings.weight": 2,
            text + "encoder.layer.0.intermediate.dense.weight": 2,
            "token_type_embeddings.weight": 2,
        }
        for name, axes in needed.items():
            if name not in shapes:
                found = ", ".join(repr(str(other)[:80]) for other in list(shapes)[:3])
                raise ValueError(f"not a full SCL model: {name!r} is missing among {len(shapes)} tensors ({found}, …)")
            if len(shapes[name]) != axes or 0 in shapes[name]:
                raise ValueError(f"{name} has the shape {tuple(shapes[name])}; {axes} axes were expected, none empty")

        def count(pattern: str) -> int:
            return len({match[1] for name in shapes if (match := re.match(pattern, name))})

        def size(name: str, axis: int, default: int) -> int:
            shape = shapes.get(name, ())
            return shape[axis] if len(shape) > axis else default

        vision_width, _, _, patch = shapes[vision + "conv1.weight"]
        vocab_size, width = shapes[text + "embeddings.word_embeddings.weight"]
        return cls(
            width=width,
            heads=max(1, width // head_width),
            mlp_width=shapes[text + "encoder.layer.0.intermediate.dense.weight"][0],
            vision_width=vision_width,
            vision_heads=max(1, vision_width // head_width),
            vision_mlp_width=shapes[vision + "transformer.resblocks.0.mlp.c_fc.weight"][0],
            vision_layers=count(r"vision_transformer\.visual\.transformer\.resblocks\.(\d+)\."),
            text_layers=count(r"text_transformer\.encoder\.layer\.(\d+)\."),
            fusion_layers=count(r"cross_modal_text_layers\.(\d+)\."),
            patch_size=patch,
            image_size=patch * math.isqrt(shapes[vision + "positional_embedding"][0] - 1),
            max_frames=size(vision + "temporal_embed", 1, 0),
            mask_vector=vision + "visual_mask_token" in shapes,
            vocab_size=vocab_size,
            max_positions=shapes[text + "embeddings.position_embeddings.weight"][0],
            token_types=shapes["token_type_embeddings.weight"][0],
            projection_width=size("vision_proj.3.weight", 0, cls.projection_width),
            answers=size("vqa_classifier.3.weight", 0, cls.answers),
            with_heads=tuple(head for head, name in HEADS.items() if count(rf"({name})(?:\.|$)")),
        )
