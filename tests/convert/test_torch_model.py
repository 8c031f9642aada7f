"""The PyTorch model computes what the reference computed: activations, losses, gradients, downstream heads."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from scl_jax.convert.torch_encoders import SCLConfig
from scl_jax.convert.torch_model import (
    DROPPED,
    SCL,
    WEIGHTS,
    Fused,
    Text,
    Views,
    Vision,
    answer_loss,
    cosines,
    load,
    pretraining_losses,
    retrieval_losses,
)

RECORDED = {  # ours → the reference's name of a loss
    "contrastive": "con_unweighted",
    "matching": "itm",
    "masked_language": "mlm",
    "global_vision": "mgsc_image",
    "global_text": "mgsc_text",
    "local_vision": "mltc_image",
    "local_text": "mltc_text",
    "total": "total",
}


class Case:
    """One recording with the model at its sizes; `dtype` is the precision of the computation."""

    def __init__(self, folder: Path, tag: str, dtype: torch.dtype) -> None:
        self.folder, self.tag, self.dtype = folder, tag, dtype
        self.meta = json.loads((folder / f"{tag}.json").read_text())
        self.arrays = np.load(folder / f"{tag}.npz")
        self.is_video = self.meta["frames"] is not None
        self.weights = dict(load_file(folder / f"{tag}.safetensors"))
        self.model = self.build(self.weights)
        local = self.meta["config"]["local_completion_weight"]
        weights = WEIGHTS | {"local_vision": local, "local_text": local}
        weights["contrastive"] = self.meta["config"]["con_weight"]
        recorded = self.arrays.files
        self.weighted = {name: weight for name, weight in weights.items() if f"loss/{RECORDED[name]}" in recorded}

    def build(self, weights: dict[str, np.ndarray]) -> SCL:
        heads = {"heads": self.meta["config"]["num_heads"], "vision_heads": self.meta["config"]["vit_heads"]}
        sizes = SCLConfig.infer({name: value.shape for name, value in weights.items()})
        model = SCL(dataclasses.replace(sizes, **heads))
        load(model, weights)
        return model.to(self.dtype).eval()

    def downstream(self, *heads: str, token_types: bool = False) -> SCL:
        """The model with downstream heads beside the pre-training ones."""
        extra = load_file(self.folder / f"{self.tag}_downstream.safetensors")
        rows = {name: value for name, value in extra.items() if name.split(".")[0] in heads}
        if token_types:
            rows["token_type_embeddings.weight"] = extra["token_type_embeddings.weight"]
        return self.build(self.weights | rows)

    def pixels(self, name: str) -> torch.Tensor:
        images = self.arrays[f"in/{name}"]
        images = images if images.ndim == 5 else images[:, None]  # an image is a video of one frame
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 1, 3, 4, 2))).to(self.dtype)

    def tensor(self, name: str) -> torch.Tensor:
        value = self.arrays[name]
        return torch.from_numpy(value if value.dtype == bool else value.astype(np.int64))

    @property
    def text(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensor("in/text_ids"), self.tensor("in/text_masks").bool()

    def views(self) -> Views:
        is_pair = self.tensor("mask/itm_labels")
        own = is_pair.bool()[:, None, None, None, None]
        return Views(
            matching_pixels=torch.where(own, self.pixels("image"), self.pixels("false_image")),
            is_pair=is_pair,
            language_ids=self.tensor("in/text_ids_mlm"),
            language_labels=self.tensor("in/text_labels_mlm"),
            kept=self.tensor("mask/drop_ids_keep"),
            replaced=None if self.is_video else self.tensor("mask/tok_mask_bool"),
            completion_ids=self.tensor("mask/text_ids_masked"),
            completion_mask=self.tensor("mask/txt_mask_bool"),
        )

    def losses(self, norm_over_frames: bool) -> dict[str, torch.Tensor]:
        inputs = self.pixels("image"), *self.text, self.views()
        temperature = self.meta["config"]["completion_temperature"]
        return pretraining_losses(self.model, *inputs, self.weighted, temperature, norm_over_frames)

    def recorded_losses(self, norm_over_frames: bool) -> dict[str, float]:
        """Of this precision; the corrected video recording holds only the losses that the correction changes."""
        prefix = "loss" if self.dtype == torch.float32 else "loss64"
        found = {ours: f"{prefix}/{name}" for ours, name in RECORDED.items()}
        if self.is_video and not norm_over_frames:
            found |= {
                ours: f"{prefix}_fixed/{name}"
                for ours, name in RECORDED.items()
                if f"{prefix}_fixed/{name}" in self.arrays.files
            }
        return {ours: float(self.arrays[name]) for ours, name in found.items() if name in self.arrays.files}


@cache
def _case(folder: Path, tag: str, dtype: torch.dtype) -> Case:
    torch.set_num_threads(1)
    return Case(folder, tag, dtype)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def case(request: pytest.FixtureRequest, golden_dir: Path, tag: str) -> Case:
    return _case(golden_dir, tag, request.param)


@pytest.fixture
def single(golden_dir: Path, tag: str) -> Case:
    return _case(golden_dir, tag, torch.float32)


def encode(case: Case, name: str) -> tuple[Text, Vision]:
    """The uni-modal half of a recorded pass."""
    views, (ids, mask) = case.views(), case.text
    ids = {"mlm": views.language_ids, "txt": views.completion_ids}.get(name, ids)
    pixels = views.matching_pixels if name == "itm" else case.pixels("image")
    masks = {"drop": {"kept": views.kept}, "tok": {"replaced": views.replaced}}.get(name, {})
    return case.model.encode_text(ids, mask), case.model.encode_image(pixels, **masks)


def record(model: SCL) -> tuple[dict[str, torch.Tensor], list]:
    """Activations by the names of the recording, filled while the model runs."""
    found, handles = {}, []

    def keep(module: torch.nn.Module, name: str, of_input: bool = False) -> None:
        handles.append(
            module.register_forward_hook(lambda _, args, out: found.update({name: args[0] if of_input else out}))
        )

    vision, text = model.vision_transformer["visual"], model.text_transformer
    keep(text.embeddings["LayerNorm"], "text_emb")
    keep(vision.ln_pre, "vis_embed", of_input=True)
    keep(vision.ln_pre, "vit_ln_pre")
    keep(vision.ln_post, "vit_ln_post_before_reorder")
    for i, block in enumerate(vision.transformer["resblocks"]):
        keep(block, f"vit_block{i}")
    for i, layer in enumerate(text.encoder["layer"]):
        keep(layer, f"text_layer{i}")
    keep(model.cross_modal_text_transform, "text_tr")
    keep(model.cross_modal_image_transform, "vis_tr")
    streams = {"text": model.cross_modal_text_layers, "image": model.cross_modal_image_layers}
    for stream, layers in streams.items():
        keep(layers[0], f"fuse_{stream}_in", of_input=True)
        for i, layer in enumerate(layers):
            keep(layer, f"fuse_{stream}_l{i}")
    return found, handles


def fuse_and_record(case: Case, name: str) -> dict[str, torch.Tensor]:
    found, handles = record(case.model)
    with torch.no_grad():
        text, vision = encode(case, name)
        fused = case.model.fuse(text, vision)
    for handle in handles:
        handle.remove()
    pooled_text, pooled_image = fused.joint.chunk(2, 1)
    return found | {
        "text_enc": text.tokens,
        "vis_enc": vision.tokens,
        "text_feats": fused.text,
        "image_feats": fused.vision,
        "pool_text": pooled_text,
        "pool_image": pooled_image,
    }


@pytest.mark.parity
@pytest.mark.parametrize("name", ["plain", "itm", "mlm", "con", "drop", "tok", "txt"])
def test_every_recorded_activation_of_a_pass_is_reproduced(single: Case, name: str) -> None:
    recorded = {key for key in single.arrays.files if key.startswith(f"{name}/")}
    if name == "tok" and single.is_video:
        assert not recorded  # video weights have no mask vector
        return
    found = fuse_and_record(single, name)
    checked = {key for key in recorded if key.split("/")[1] in found}
    for key in checked:
        np.testing.assert_allclose(found[key.split("/")[1]].numpy(), single.arrays[key], atol=5e-5, rtol=0, err_msg=key)
    elsewhere = ("logits", "proj_", "sim_", "_ids_mask")  # checked by the tests below, or inputs
    assert all(any(part in key for part in elsewhere) for key in recorded - checked)


@pytest.mark.parity
def test_heads_of_pretraining_give_the_recorded_logits_and_similarities(single: Case) -> None:
    arrays, model = single.arrays, single.model
    with torch.no_grad():
        text, vision = encode(single, "con")
        matching, language = (model.fuse(*encode(single, name)) for name in ("itm", "mlm"))
        found = {
            "con/proj_text": model.project_text(text),
            "con/proj_image": model.project_image(vision),
            "con/sim_con": cosines(model.project_text(text), model.project_image(vision)),
            "itm/logits": model.matching_logits(matching),
            "mlm/logits": model.language_logits(language.text),
        }
    for key, value in found.items():
        np.testing.assert_allclose(value.numpy(), arrays[key], atol=5e-5, rtol=0, err_msg=key)


@pytest.mark.parity
def test_similarities_of_completion_have_predictions_as_rows(single: Case) -> None:
    frames, model = single.pixels("image").shape[1], single.model
    with torch.no_grad():
        passes = {
            name: model.fuse(*encode(single, name))
            for name in ("txt", "drop", "tok")
            if f"{name}/text_feats" in single.arrays.files
        }
    completing, dropped = passes["txt"], passes["drop"]
    found = {"sim_mgsc_text": cosines(completing.text[:, 0], dropped.text[:, 0])}
    for frame in range(frames):
        name = f"sim_fixed_mgsc_image_f{frame}" if single.is_video else "sim_mgsc_image"
        found[name] = cosines(dropped.vision[:, frame], completing.vision[:, frame])
    if "tok" in passes:
        masked, patches = single.views().completion_mask, single.views().replaced
        found["sim_mltc_text"] = cosines(completing.text[masked], dropped.text[masked])
        found["sim_mltc_image"] = cosines(passes["tok"].vision[:, 1:][patches], completing.vision[:, 1:][patches])
    for key, value in found.items():
        np.testing.assert_allclose(value.numpy(), single.arrays[f"txt/{key}"], atol=5e-5, rtol=0, err_msg=key)


@pytest.mark.parity
@pytest.mark.parametrize("norm_over_frames", [False, True], ids=["corrected", "as_reference"])
def test_pretraining_losses_equal_the_recorded_ones(case: Case, norm_over_frames: bool) -> None:
    if norm_over_frames and not case.is_video:
        return  # image global completion of the reference is the corrected one
    with torch.no_grad():
        losses = case.losses(norm_over_frames)
    tolerance = 5e-5 if case.dtype == torch.float32 else 1e-7
    recorded = case.recorded_losses(norm_over_frames)
    assert set(losses) == set(recorded)
    for name, value in recorded.items():
        assert abs(losses[name].item() - value) <= tolerance * max(1, abs(value)), name


@pytest.mark.parity
@pytest.mark.parametrize("norm_over_frames", [False, True], ids=["corrected", "as_reference"])
def test_gradients_of_all_parameters_equal_the_recorded_ones(case: Case, norm_over_frames: bool) -> None:
    if norm_over_frames and not case.is_video:
        return
    suffix = "_grads_fixed" if case.is_video and not norm_over_frames else "_grads"
    recorded = load_file(case.folder / f"{case.tag}{suffix}.safetensors")
    case.model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):  # CPU flash attention rounds the zero gradients of key biases to 2e-5
        case.losses(norm_over_frames)["total"].backward()
    found = {name: parameter.grad for name, parameter in case.model.named_parameters() if parameter.grad is not None}
    assert set(found) == set(recorded) - set(case.meta["no_grad_params"])
    for name, gradient in found.items():
        scale = 1e-5 if name in case.meta["zero_grad_params"] else 1e-4 * np.abs(recorded[name]).max()
        np.testing.assert_allclose(gradient.numpy(), recorded[name], atol=scale, rtol=0, err_msg=name)


def check_downstream(case: Case, task: str, loss: torch.Tensor, **activations: torch.Tensor) -> None:
    """Loss, activations (`task/…`) and gradients (`grad_task/…`) of a downstream task against the recording."""
    prefix, tolerance = ("loss", 5e-5) if case.dtype == torch.float32 else ("loss64", 1e-7)
    recorded = float(case.arrays[f"{prefix}/{task}"])
    assert abs(loss.item() - recorded) <= tolerance * max(1, abs(recorded)), task
    for key, value in activations.items():
        name = key.replace("__", "/")
        np.testing.assert_allclose(value.detach().numpy(), case.arrays[name], atol=5e-5, rtol=0, err_msg=name)


def check_gradients(case: Case, model: SCL, task: str) -> None:
    names = [key for key in case.arrays.files if key.startswith(f"grad_{task}/")]
    assert names
    for key in names:
        name, expected = key.split("/", 1)[1], case.arrays[key]
        scale = 1e-5 if name == "rank_output.bias" else 1e-4 * np.abs(expected).max()
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        np.testing.assert_allclose(gradient.numpy(), expected, atol=scale, rtol=0, err_msg=name)


@pytest.mark.parity
def test_visual_question_answering_equals_the_recording(case: Case) -> None:
    model = case.downstream("vqa_classifier")
    fused = model.fuse(model.encode_text(*case.text), model.encode_image(case.pixels("image")))
    logits = model.answer_logits(fused)
    loss = answer_loss(logits, torch.from_numpy(case.arrays["in/vqa_targets"]).to(case.dtype))
    loss.backward()
    check_downstream(case, "vqa", loss, vqa__logits=logits, vqa__cls_feats=fused.joint)
    check_gradients(case, model, "vqa")


@pytest.mark.parity
def test_statements_about_two_images_equal_the_recording(case: Case) -> None:
    model = case.downstream("nlvr2_classifier", token_types=True)
    text = model.encode_text(*case.text)
    left, right = (model.encode_image(case.pixels(name)) for name in ("image_0", "image_1"))
    logits = model.statement_logits(text, left, right)
    loss = torch.nn.functional.cross_entropy(logits, case.tensor("in/nlvr2_answers"))
    loss.backward()
    pooled = [
        half for i, image in enumerate((left, right)) for half in model.fuse(text, image, i + 1).joint.chunk(2, 1)
    ]
    names = ("nlvr2_1__pool_text", "nlvr2_1__pool_image", "nlvr2_2__pool_text", "nlvr2_2__pool_image")
    check_downstream(case, "nlvr2", loss, nlvr2__logits=logits, **dict(zip(names, pooled, strict=True)))
    check_gradients(case, model, "nlvr2")


def retrieval_texts(case: Case, model: SCL) -> Text:
    """The true text of each image followed by its false ones."""
    (ids, mask), false = case.text, case.tensor("in/false_text_ids")
    ids = torch.cat([ids[:, None], false], 1).flatten(0, 1)
    mask = torch.cat([mask[:, None], case.tensor("in/false_text_masks").bool()], 1).flatten(0, 1)
    return model.encode_text(ids, mask)


@pytest.mark.parity
def test_retrieval_equals_the_recording_under_the_reference_behaviour(case: Case) -> None:
    model = case.downstream("rank_output")
    vision, texts = model.encode_image(case.pixels("image")), retrieval_texts(case, model)
    per_image = len(texts.tokens) // len(vision.tokens)
    losses = retrieval_losses(model, vision, texts, first_image_only=True)
    weighted = losses["rank"] + case.meta["config"]["con_weight"] * losses["contrastive"]
    weighted.backward()
    images, words = model.project_image(vision), model.project_text(texts)
    fused: Fused = model.fuse(texts, Vision(vision.tokens.repeat_interleave(per_image, 0), vision.frames))
    pooled_text, pooled_image = fused.joint.chunk(2, 1)
    activations = {
        "irtr__rank_scores": model.rank_scores(fused).view(-1, per_image),
        "irtr__proj_text": words,
        "irtr__proj_image": images[:1],
        "irtr__sim_con": cosines(images[:1], words),
        "irtr__pool_text": pooled_text,
        "irtr__pool_image": pooled_image,
    }
    check_downstream(case, "irtr", losses["rank"], **activations)
    check_downstream(case, "irtr_con", case.meta["config"]["con_weight"] * losses["contrastive"])  # weighted
    check_gradients(case, model, "irtr")


FULL_SIZE = ["image_pretrain_288", "video_pretrain_224", "image_vqa_384", "image_nlvr2_288", "image_irtr_384"]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_at_full_size_are_those_of_the_reference(name: str) -> None:
    shapes = json.loads((Path(__file__).parents[1] / "golden" / "state_dict_names_full.json").read_text())[name]
    with torch.device("meta"):
        model = SCL(SCLConfig.infer(shapes))
    dropped = [key for key in shapes if any(re.fullmatch(rule, key) for rule in DROPPED)]
    kept = {key: tuple(shape) for key, shape in shapes.items() if key not in dropped}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == kept
    assert model.config.vision_layers == 11 and model.config.heads == 12


def test_what_is_left_out_of_a_reference_checkpoint_comes_with_its_reason(single: Case) -> None:
    dropped = load(single.build(single.weights), single.weights)
    assert set(dropped) == set(single.weights) - set(single.model.state_dict())
    assert dropped["text_transformer.pooler.dense.bias"].startswith("RoBERTa's pooler")
