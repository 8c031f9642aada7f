"""Weights of other sizes → this model's sizes: the named steps of starting from a checkpoint.

Each step is a pure function of tables; `fit` applies the step that `STEPS` names for a parameter whose shape differs.
Axes: R rows, F frames, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scl_jax.convert.rules import RULES, ConversionError
from scl_jax.models.vision import resize_positions

Table = Float[np.ndarray, "R D"]
HEADS = r"(contrastive|matching|masked_language|vqa|nlvr2|entailment|rank)\..*"  # parameters outside the encoders


def resize_position_rows(table: Table, rows: int) -> Table:
    """Position rows of a square image ([CLS] first), resized bicubically as torch does it (METHOD section 7)."""
    old, grid = math.isqrt(len(table) - 1), math.isqrt(rows - 1)
    for count, side in ((len(table), old), (rows, grid)):
        if side < 1 or side * side + 1 != count:
            raise ValueError(f"{count} rows are no square grid and a [CLS]")
    return np.asarray(resize_positions(jnp.asarray(table), grid))


def fit_temporal_rows(table: Table, rows: int) -> Table:
    """The first `rows` frames; frames that the weights never saw get zeros."""
    return np.concatenate([table[:rows], np.zeros((max(rows - len(table), 0), table.shape[1]), table.dtype)])


def cut_text_positions(table: Table, rows: int) -> Table:
    """The first `rows` text positions: exact for texts of `rows` - 2 tokens; more rows cannot be made up."""
    if rows > len(table):
        raise ValueError(f"{len(table)} rows are fewer than model.text.max_positions = {rows}; set it to {len(table)}")
    return table[:rows]


def fit_token_types(table: Table, rows: int) -> Table:
    """NLVR2's row 2 (the second image) starts as row 1 (the image); fewer rows: the first ones."""
    second = np.repeat(table[1:2], max(rows - len(table), 0), axis=0)
    return np.concatenate([table[:rows], second])


def rank_from_matching(kernel: Float[np.ndarray, "J 2"], bias: Float[np.ndarray, " 2"]) -> dict[str, np.ndarray]:
    """The rank head starts as row 1, "a pair", of the matching head (METHOD section 7)."""
    return {"rank.kernel": kernel[:, 1:2], "rank.bias": bias[1:2]}


STEPS: dict[str, Callable[[Table, int], Table]] = {
    "vision.position_embedding": resize_position_rows,
    "vision.temporal_embedding": fit_temporal_rows,
    "text.position_embedding.embedding": cut_text_positions,
    "fusion.token_type": fit_token_types,
}
_TORCH_NAMES = {rule.flax: rule.torch[0] for rule in RULES}


def fit(
    parameters: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Parameters that may be of other sizes → those that a model of `shapes` takes, and a line for every step.

    A head that the weights lack is not in the result; one that the model lacks is left out.

    Raises:
        ConversionError: names every parameter that is missing, unknown, or of a shape that no step changes.
    """
    fitted, steps, problems = {}, [], []
    parameters = dict(parameters)
    if "rank.kernel" in shapes and "rank.kernel" not in parameters and "matching.dense.kernel" in parameters:
        parameters |= rank_from_matching(parameters["matching.dense.kernel"], parameters["matching.dense.bias"])
        steps.append("rank: starts from row 1 of the matching head")
    for path, shape in shapes.items():
        if path not in parameters:
            if not re.fullmatch(HEADS, path):
                problems.append(f"missing: {path} ({_TORCH_NAMES.get(path, path)})")
            continue
        value, found = parameters[path], tuple(parameters[path].shape)
        if found == tuple(shape):
            fitted[path] = value
        elif path in STEPS and len(found) == len(shape) == 2 and found[1] == shape[1]:
            try:
                fitted[path] = STEPS[path](value, shape[0])
                steps.append(f"{path}: {found[0]} → {shape[0]} rows ({STEPS[path].__name__})")
            except ValueError as error:
                problems.append(f"{path} ({_TORCH_NAMES.get(path, path)}): {error}")
        else:
            problems.append(f"{path} ({_TORCH_NAMES.get(path, path)}) is {found}, but the model needs {tuple(shape)}")
    for path in sorted(set(parameters) - set(shapes)):
        if re.fullmatch(HEADS, path):
            steps.append(f"{path}: left out, the model has no such head")
        else:
            problems.append(f"unused: {path} ({_TORCH_NAMES.get(path, path)})")
    if problems:
        raise ConversionError("the weights do not fit this model:\n  " + "\n  ".join(problems))
    return fitted, steps
