"""The named scopes of a training step, and which one an instruction of a compiled program belongs to."""

from __future__ import annotations

import re

# `jax.named_scope`s of the step: parts, and what is inside the three encoders
PARTS = (
    "vision",
    "text",
    "fusion",
    "contrastive_head",
    "matching_head",
    "masked_language_head",
    "local_completion",
    "whole_batch_losses",
    "masks",
    "optimizer",
)
INNER = ("qkv", "attention", "mlp", "norm")
_PART = re.compile(rf"\b({'|'.join(PARTS)})\b")
_INNER = re.compile(rf"\b({'|'.join(INNER)})\b")


def scope_of(op_name: str) -> str:
    """The scope in an instruction's name: "vision/attention backward"; "other" outside of every scope."""
    part, inner = _PART.search(op_name), _INNER.findall(op_name)
    name = part.group() if part else "other"
    if part and inner:
        name += f"/{inner[-1]}"
    return f"{name} backward" if "transpose(" in op_name else name
