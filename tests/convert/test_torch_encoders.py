"""The PyTorch model without recordings: configuration, loading, what frames see, padding, losses, clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scl_jax.convert.torch_encoders import PIXEL_MEAN, PIXEL_STD, SCLConfig
from scl_jax.convert.torch_files import read_tensors
from scl_jax.convert.torch_model import SCL, cosines, global_vision_loss, info_nce, load, local_loss, retrieval_losses


def small(**changes: object) -> SCL:
    """A small model with random weights, in evaluation mode."""
    sizes = {"width": 16, "heads": 2, "mlp_width": 32, "vision_width": 16, "vision_heads": 2, "vision_mlp_width": 32}
    depths = {"vision_layers": 2, "text_layers": 1, "fusion_layers": 1, "image_size": 32, "vocab_size": 40}
    torch.manual_seed(0)
    return SCL(SCLConfig(**sizes | depths | {"projection_width": 8, "answers": 5} | changes)).eval()


def test_weights_that_do_not_fit_are_named() -> None:
    model = small()
    weights = dict(model.state_dict())
    with pytest.raises(ValueError, match="itm_score.fc.bias"):
        load(model, {name: value for name, value in weights.items() if name != "itm_score.fc.bias"})
    with pytest.raises(ValueError, match="surplus.weight"):
        load(model, weights | {"surplus.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="cross_modal_text_transform.weight"):
        load(model, weights | {"cross_modal_text_transform.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="positional_embedding' is missing"):
        SCLConfig.infer({"vision_transformer.visual.conv1.weight": (4, 3, 16, 16)})


def test_a_folder_gives_back_the_model(tmp_path: Path) -> None:
    model = small(with_heads=("contrastive", "vqa", "entailment"), max_frames=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"model_type": "scl"}))
    again = SCL.from_folder(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json lacks width"):
        SCL.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        SCL.from_folder(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="unknown head 'poetry'"):
        SCLConfig(with_heads=("poetry",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("error")
def test_weights_are_loaded_from_any_torch_file(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in small().state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 1}, tmp_path / "scl.ckpt")
    model = small(dropout=0.2)
    torch.nn.init.zeros_(model.token_type_embeddings.weight)
    assert load(model, read_tensors(tmp_path / "scl.ckpt")) == {}
    assert all(torch.equal(value, weights[name].float()) for name, value in model.state_dict().items())


def test_raw_bytes_are_normalised_as_clip_does() -> None:
    model, raw = small(), torch.randint(0, 256, (2, 1, 32, 32, 3), dtype=torch.uint8)
    normalised = (raw / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    torch.testing.assert_close(model.encode_image(raw).tokens, model.encode_image(normalised).tokens)


def test_what_the_weights_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="9 frames, but these weights have 8 temporal rows"):
        small(max_frames=8).encode_image(torch.zeros(1, 9, 32, 32, 3))
    with pytest.raises(ValueError, match="no visual_mask_token"):
        small(mask_vector=False).encode_image(torch.zeros(1, 1, 32, 32, 3), replaced=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="a frame has 9 patches, the position embedding 4"):
        small().encode_image(torch.zeros(1, 1, 48, 48, 3))


def test_weights_without_temporal_rows_take_clips_as_if_the_rows_were_zero() -> None:
    image, video = small(), small(max_frames=4)
    rows = {"vision_transformer.visual.temporal_embed": torch.zeros(1, 4, 16)}
    load(video, image.state_dict() | rows)
    clip = torch.randn(2, 3, 32, 32, 3)
    torch.testing.assert_close(image.encode_image(clip).tokens, video.encode_image(clip).tokens)


def test_a_patch_sees_its_own_frame_only_and_cls_sees_all() -> None:
    model, clip = small(), torch.randn(1, 2, 32, 32, 3)
    changed = clip.clone()
    changed[:, 1] += 1
    found: list[torch.Tensor] = []
    block = model.vision_transformer["visual"].transformer["resblocks"][0]
    block.register_forward_hook(lambda _, args, out: found.append(out))
    for pixels in (clip, changed):
        model.encode_image(pixels)
    same = (found[0] == found[1]).all(-1)[0]
    assert same[1:5].all() and not same[0] and not same[5:].any()


def test_padding_changes_nothing() -> None:
    model, image = small(), torch.randn(1, 1, 32, 32, 3)
    ids = torch.tensor([[0, 7, 9, 2]])
    padded = torch.tensor([[0, 7, 9, 2, 1, 1]])
    joints = [
        model.fuse(model.encode_text(tokens, tokens != 1), model.encode_image(image)).joint for tokens in (ids, padded)
    ]
    torch.testing.assert_close(*joints)


def test_local_completion_is_the_mean_over_groups_weighted_by_their_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 6, 8, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]]).bool()
    parts = [local_loss(x[rows], y[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(local_loss(x, y, mask, group=2), (3 * parts[0] + 4 * parts[1]) / 7)
    assert local_loss(x, y, torch.zeros_like(mask)) == 0


def test_targets_of_completion_get_no_gradient() -> None:
    x, y = (torch.randn(3, 2, 8, requires_grad=True) for _ in range(2))
    (global_vision_loss(x, y) + local_loss(x, y, torch.ones(3, 2, dtype=torch.bool))).backward()
    assert x.grad is not None and y.grad is None


def test_contrastive_retrieval_loss_is_over_images_and_their_true_texts() -> None:
    model = small(with_heads=("contrastive", "rank"))
    ids = torch.randint(3, 40, (6, 5))
    texts, vision = model.encode_text(ids, ids != 1), model.encode_image(torch.randn(3, 1, 32, 32, 3))
    similarities = cosines(model.project_image(vision), model.project_text(texts)[::2])
    torch.testing.assert_close(
        retrieval_losses(model, vision, texts)["contrastive"], info_nce(similarities, model.cl_temp)
    )


def test_dropout_is_in_training_mode_only() -> None:
    model, ids = small(dropout=0.5), torch.tensor([[0, 7, 9, 2]])
    first, second = (model.encode_text(ids, ids != 1).tokens for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    assert not torch.equal(*(model.encode_text(ids, ids != 1).tokens for _ in range(2)))
