"""The network computes the reference's numbers: every recorded activation, loss and gradient, with explicit masks.

Runs on every tag in SCL_GOLDEN_DIR. Tolerances are those of golden/README.md.
"""

from __future__ import annotations

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_case import GOLDEN, LOSS_NAMES, GoldenCase, golden_losses
from safetensors.numpy import load_file

from scl_jax.convert.rules import flax_to_torch, torch_to_flax
from scl_jax.models import parameters
from scl_jax.models.fusion import IMAGE_TYPE, SECOND_IMAGE_TYPE
from scl_jax.models.heads import Classifier, unit
from scl_jax.models.layers import Precision, gather_tokens
from scl_jax.models.vision import side_by_side

pytestmark = pytest.mark.parity

ACTIVATION, LOSS, GRADIENT, LOSS_64, ZERO_GRADIENT = 5e-5, 5e-5, 1e-4, 1e-7, 1e-5


@lru_cache
def case_of(tag: str) -> GoldenCase:
    return GoldenCase(tag)


def frame_major(x):
    """(B, F, N, D) → (B, F·N, D)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def run_pass(
    case: GoldenCase, pixels, ids, mask, keep=None, replaced=None, image_type=IMAGE_TYPE, layers=False
) -> dict:
    """All activations of one pass under their recorded names; passes of the same shapes share a program."""
    return traced_pass(case.graph, image_type, layers, case.params, pixels, ids, mask, keep, replaced)


@partial(jax.jit, static_argnums=(0, 1, 2))
def traced_pass(graph, image_type: int, layers: bool, params, *inputs) -> dict:
    return activations(parameters.merge(graph, params), *inputs, image_type=image_type, layers=layers)


def activations(model, pixels, ids, mask, keep, replaced, *, image_type: int, layers: bool) -> dict:
    frames = pixels.shape[1]
    out = {"text_emb": model.text.embed(ids)}
    embedded = model.vision.embed(pixels, keep, replaced)
    out["vis_embed"] = frame_major(embedded)
    if layers:
        x, shapes = side_by_side([embedded[:, None]]), [(1, *embedded.shape[1:3])]
        x = model.vision.norm_pre(x)
        out["vit_ln_pre"] = frame_major(x.reshape(embedded.shape))
        x, blocks = model.vision.blocks(x, lambda block, x, _: block(x, shapes), return_layers=True)
        out |= {f"vit_block{i}": frame_major(block.reshape(embedded.shape)) for i, block in enumerate(blocks)}
        out["vit_ln_post_before_reorder"] = frame_major(model.vision.norm_post(x).reshape(embedded.shape))
        _, texts = model.text.layers(out["text_emb"], lambda layer, x, key: layer(x, mask, key=key), return_layers=True)
        out |= {f"text_layer{i}": text for i, text in enumerate(texts)}
    out["text_enc"], out["vis_enc"] = model.text(ids, mask), model.vision(pixels, keep, replaced)
    text, image = model.encode_text(ids, mask), model.encode_image(pixels, keep, replaced)
    out["text_tr"], out["vis_tr"] = text, image
    out["fuse_text_in"], out["fuse_image_in"] = model.fusion.add_types(text, image, image_type)
    _, (texts, images) = model.fusion.layers(
        (out["fuse_text_in"], out["fuse_image_in"]), lambda layer, xy, key: layer(*xy, mask, key), return_layers=True
    )
    out |= {f"fuse_text_l{i}": x for i, x in enumerate(texts)} | {f"fuse_image_l{i}": x for i, x in enumerate(images)}
    fused = model.fuse(text, mask, image, frames, image_type=image_type)
    out["text_feats"], out["image_feats"] = fused.text, fused.image
    out["pool_text"], out["pool_image"] = model.fusion.pool(fused)
    return out


def inputs_of(case: GoldenCase) -> dict[str, dict]:
    """The arguments of `run_pass` for every recorded pre-training pass."""
    batch, masks = case.batch(), case.masks()
    keeps = masks.is_pair.reshape(-1, 1, 1, 1, 1)
    clean = {"pixels": batch.pixels, "ids": batch.token_ids, "mask": batch.token_mask}
    passes = {
        "plain": clean | {"layers": True},
        "itm": clean | {"pixels": jnp.where(keeps, batch.pixels, case.pixels("in/false_image"))},
        "mlm": clean | {"ids": masks.language_ids},
        "con": clean,
        "drop": clean | {"keep": masks.keep},
        "txt": clean | {"ids": masks.completion_ids},
    }
    if "mask/tok_mask_bool" in case.arrays:
        passes["tok"] = clean | {"replaced": masks.replaced}
    return passes


def test_every_recorded_activation_of_pretraining(tag):
    case = case_of(tag)
    computed = {}
    for name, arguments in inputs_of(case).items():
        computed |= {f"{name}/{key}": value for key, value in run_pass(case, **arguments).items()}
    computed |= jax.jit(lambda params, x: head_outputs(case, case.model(params), x))(case.params, computed)
    recorded = {name for name in case.arrays.files if name.split("/")[0] in inputs_of(case)}
    recorded -= {name for name in recorded if name.endswith("_ids_mask")}  # inputs
    assert recorded <= set(computed), f"not computed: {sorted(recorded - set(computed))}"
    for name in sorted(recorded):
        error = np.abs(np.asarray(computed[name]) - case[name]).max()
        assert error <= ACTIVATION, f"{name}: {error:.2e}"


def head_outputs(case: GoldenCase, model, passes: dict) -> dict:
    """Logits, projections and similarities."""
    frames = case.batch().pixels.shape[1]
    joint = jnp.concatenate([passes["itm/pool_text"], passes["itm/pool_image"]], axis=-1)
    out = {"itm/logits": model.matching(joint), "mlm/logits": model.masked_language(passes["mlm/text_feats"])}
    out["con/proj_text"] = model.project_text(passes["con/text_tr"])
    out["con/proj_image"] = model.project_image(passes["con/vis_tr"], frames)
    out["con/sim_con"] = cosines(out["con/proj_text"], out["con/proj_image"])
    out["txt/sim_mgsc_text"] = cosines(passes["txt/text_feats"][:, 0], passes["drop/text_feats"][:, 0])
    drop, txt = passes["drop/image_feats"][:, :frames], passes["txt/image_feats"][:, :frames]
    if case.is_video:
        for f in range(frames):
            out[f"txt/sim_fixed_mgsc_image_f{f}"] = cosines(drop[:, f], txt[:, f])
            over_frames = jnp.einsum("be,ce->bc", unit(drop, 1)[:, f], unit(txt, 1)[:, f])
            out[f"txt/sim_mgsc_image_f{f}"] = over_frames
    else:
        out["txt/sim_mgsc_image"] = cosines(drop[:, 0], txt[:, 0])
        replaced = case["mask/tok_mask_bool"]  # recorded in the order of positions
        tok, target = (passes[f"{name}/image_feats"][:, 1:][replaced] for name in ("tok", "txt"))
        out["txt/sim_mltc_image"] = cosines(tok, target)
        chosen = case["mask/txt_mask_bool"]
        out["txt/sim_mltc_text"] = cosines(passes["txt/text_feats"][chosen], passes["drop/text_feats"][chosen])
    return out


def cosines(a, b):
    return unit(a) @ unit(b).T


@pytest.mark.parametrize("as_is", [False, True], ids=["corrected", "reference"])
def test_losses_and_every_gradient(tag, as_is):
    case = case_of(tag)
    if as_is and not case.is_video:
        return  # images have one behaviour; float64 below tells that the switch leaves them alone
    value_and_grad = jax.jit(jax.value_and_grad(lambda p: golden_losses(case, p, as_is), has_aux=True))
    (total, losses), gradient = value_and_grad(case.params)
    fixed = "_fixed" if case.is_video and not as_is else ""
    for name, value in {**losses, "total": total}.items():
        expected = recorded_loss(case, "loss", fixed, name)
        assert abs(float(value) - expected) <= LOSS * (max(1, abs(expected)) if as_is else 1), name

    flat = {path: np.asarray(x) for path, x in parameters.flatten(gradient).items()}
    tensors = flax_to_torch(flat, leave_out=case.absent)
    recorded = load_file(GOLDEN / f"{tag}_grads{fixed}.safetensors")
    assert set(tensors) == set(recorded)
    for name, expected in recorded.items():
        error = np.abs(tensors[name] - expected).max()
        zero = name in case.meta["zero_grad_params"]
        # as-is video losses are 30 times larger, and so is the rounding noise of gradients that are truly zero
        limit = ZERO_GRADIENT * (30 if as_is else 1) if zero else GRADIENT * np.abs(expected).max()
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


def recorded_loss(case: GoldenCase, kind: str, fixed: str, name: str) -> float:
    recorded = LOSS_NAMES.get(name, name)
    for key in (f"{kind}{fixed}/{recorded}", f"{kind}/{recorded}"):
        if key in case.arrays:
            return float(case[key])
    raise KeyError(f"{case.tag} has no {kind}/{recorded}")


@pytest.mark.parametrize("as_is", [False, True], ids=["corrected", "reference"])
def test_losses_in_float64(tag, as_is):
    """float32 does not see a wrong LayerNorm epsilon; float64 does."""
    with jax.enable_x64(True):
        case = GoldenCase(tag, jnp.float64)
        total, losses = jax.jit(lambda p: golden_losses(case, p, as_is))(case.params)
        fixed = "_fixed" if case.is_video and not as_is else ""
        for name, value in {**losses, "total": total}.items():
            assert value.dtype == jnp.float64
            assert abs(float(value) - recorded_loss(case, "loss64", fixed, name)) <= LOSS_64, name


def downstream(case: GoldenCase, name: str, width: int, hidden: int, classes: int) -> Classifier:
    """A recorded classifier, through the conversion rules."""
    precision = Precision(case.dtype, case.dtype)
    graph, shapes = parameters.abstract(partial(Classifier, width, hidden, classes, precision))
    wanted = {f"{name}.{path}": x.shape for path, x in parameters.flatten(shapes).items()}
    tensors = load_file(GOLDEN / f"{case.tag}_downstream.safetensors")
    own = {key: value for key, value in tensors.items() if key.startswith(f"{name}_classifier.")}
    flat, _ = torch_to_flax(own, wanted)
    return nnx.merge(graph, parameters.unflatten({path[len(name) + 1 :]: jnp.asarray(x) for path, x in flat.items()}))


def test_answers_and_statements(tag):
    """The network under VQA and NLVR2: joint vectors, both images of a statement, logits."""
    case = case_of(tag)
    batch, width = case.batch(), case.config["hidden_size"]
    plain = run_pass(case, batch.pixels, batch.token_ids, batch.token_mask)
    joint = jnp.concatenate([plain["pool_text"], plain["pool_image"]], axis=-1)
    np.testing.assert_allclose(joint, case["vqa/cls_feats"], atol=ACTIVATION)
    head = downstream(case, "vqa", 2 * width, 2 * width, case.config["vqav2_label_size"])
    np.testing.assert_allclose(head(joint), case["vqa/logits"], atol=ACTIVATION)

    pair = GoldenCase(tag)
    types = load_file(GOLDEN / f"{tag}_downstream.safetensors")["token_type_embeddings.weight"]
    pair.params["fusion"]["token_type"] = jnp.asarray(types)
    joints = []
    for number, image_type in enumerate((IMAGE_TYPE, SECOND_IMAGE_TYPE)):
        pixels = pair.pixels(f"in/image_{number}")
        out = run_pass(pair, pixels, batch.token_ids, batch.token_mask, image_type=image_type)
        for name in ("pool_text", "pool_image"):
            np.testing.assert_allclose(out[name], case[f"nlvr2_{number + 1}/{name}"], atol=ACTIVATION)
        joints += [out["pool_text"], out["pool_image"]]
    head = downstream(case, "nlvr2", 4 * width, 2 * width, 2)
    np.testing.assert_allclose(head(jnp.concatenate(joints, axis=-1)), case["nlvr2/logits"], atol=ACTIVATION)


def test_masked_heads_see_the_masked_positions_only(tag):
    """Logits at the slots equal the recorded logits at those positions."""
    case = case_of(tag)
    batch, masks = case.batch(), case.masks()
    out = run_pass(case, batch.pixels, masks.language_ids, batch.token_mask)
    logits = case.model().masked_language(gather_tokens(out["text_feats"], masks.language_slots))
    expected = np.take_along_axis(case["mlm/logits"], np.asarray(masks.language_slots)[..., None], axis=1)
    np.testing.assert_allclose(logits, expected, atol=ACTIVATION)
