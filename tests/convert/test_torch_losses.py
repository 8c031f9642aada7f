"""Where the reference has no recording: the PyTorch model's losses of clips and images are those of the JAX code."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from scl_jax.convert.torch_config import SCLConfig
from scl_jax.convert.torch_model import SCL, Views, global_vision_loss, pretraining_losses
from scl_jax.objectives import global_completion, local_completion

SIZES = SCLConfig(
    width=16, heads=2, mlp_width=32, vision_width=16, vision_heads=2, vision_mlp_width=32, vision_layers=1,
    text_layers=1, fusion_layers=1, patch_size=16, image_size=64, max_frames=3, vocab_size=50, max_positions=16,
    projection_width=8,
)  # fmt: skip


@pytest.mark.parametrize("norm_over_frames", [False, True])
@pytest.mark.parametrize("frames", [1, 3])
def test_global_completion_of_images_and_clips(frames: int, norm_over_frames: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(4, frames, 8)).astype(np.float32) for _ in range(2))
    found = global_vision_loss(torch.from_numpy(x), torch.from_numpy(y), 0.1, norm_over_frames)
    expected = global_completion.global_vision_loss(
        jnp.asarray(x), jnp.asarray(y), 0.1, jnp.ones(4), norm_over_frames
    ).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("frames", [1, 3])
def test_local_completion_keeps_frames_apart(frames: int) -> None:
    torch.manual_seed(0)
    model = SCL(SIZES).eval()
    for parameter in model.parameters():  # large enough that inputs matter
        parameter.data += 0.2 * torch.randn_like(parameter)
    batch, patches, chosen = 20, 16, 4  # a whole group, and a small one
    pixels = torch.randn(batch, frames, 64, 64, 3)
    ids, mask = torch.randint(5, 50, (batch, 6)), torch.ones(batch, 6, dtype=torch.bool)
    replaced = torch.rand(batch, patches).argsort(1) < chosen
    views = Views(pixels, torch.ones(batch), ids, ids, torch.zeros(batch, 1).long(), replaced, ids.flip(1), mask)
    with torch.no_grad():
        found = pretraining_losses(model, pixels, ids, mask, views, {"local_vision": 1.0})["local_vision"]
        predicted = model.fuse(model.encode_text(ids, mask), model.encode_image(pixels, replaced=replaced)).vision
        target = model.fuse(model.encode_text(ids.flip(1), mask), model.encode_image(pixels)).vision

    def slots(x: torch.Tensor) -> jnp.ndarray:  # (B, F, R, D)
        by_frame = x[:, frames:].unflatten(1, (frames, patches)).movedim(1, 2)
        return jnp.asarray(by_frame[replaced].unflatten(0, (batch, chosen)).movedim(2, 1).numpy())

    total = weight = 0.0
    for rows in (slice(0, 16), slice(16, batch)):
        x, y = slots(predicted)[rows], slots(target)[rows]
        part = local_completion.local_vision_loss(x, y, jnp.ones(len(x)), 0.03, 1)
        total, weight = total + float(part.total), weight + float(part.weight)
    assert float(found) == pytest.approx(total / weight, rel=1e-4)
