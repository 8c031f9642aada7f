"""CLIP and RoBERTa as Hugging Face computes them, and checkpoints as the start of training."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from golden_case import GOLDEN
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, RobertaConfig, RobertaForMaskedLM

from scl_jax import build
from scl_jax.config import default_config
from scl_jax.convert.__main__ import main
from scl_jax.convert.checkpoints import write_parameters
from scl_jax.convert.initial import initial_parameters
from scl_jax.convert.rules import ConversionError
from scl_jax.models import parameters

WIDTH, LIMIT = 32, 5e-5
CLIP = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP |= {"image_size": 64, "patch_size": 16, "hidden_act": "quick_gelu"}


def tiny_config(**init: str):
    config = default_config()
    config.model.vision.update(width=WIDTH, layers=2, heads=2, mlp_width=64, image_size=64)
    config.model.text.update(width=WIDTH, layers=2, heads=2, mlp_width=64, vocab_size=60, max_positions=34)
    config.model.fusion.update(width=WIDTH, layers=1, heads=2, mlp_width=64)
    config.model.update(projection_width=16, dtype="float32")
    config.init.update(init)
    return config


def start(config):
    """(model with the initial parameters, notes)."""
    graph, params = parameters.split(build.model_maker(config)(nnx.Rngs(0)))
    params, notes = initial_parameters(config, params)
    return parameters.merge(graph, params), notes


def clip_vision() -> CLIPVisionModel:
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def roberta() -> RobertaForMaskedLM:
    torch.manual_seed(0)
    sizes = RobertaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60,
        max_position_embeddings=40, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    return RobertaForMaskedLM(sizes).eval()


def openai_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIPVisionModel's names → OpenAI's."""
    swaps = [
        ("embeddings.patch_embedding", "conv1"), ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"), ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"), ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"),
        ("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
    ]  # fmt: skip
    found = {}
    for name, value in state.items():
        if "self_attn.q_proj" in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            kind = name.rsplit(".", 1)[1]
            name, value = name.replace(f"self_attn.q_proj.{kind}", f"attn.in_proj_{kind}"), torch.cat(parts)
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        for old, new in swaps:
            name = name.replace(old, new)
        found[f"visual.{name}"] = value
    return found | {"visual.proj": torch.zeros(WIDTH, 8), "logit_scale": torch.tensor(4.6)}


@pytest.mark.parametrize("form", ["CLIPVisionModel", "CLIPModel", "OpenAI"])
def test_clip_without_its_last_block_is_computed(form: str, tmp_path: Path) -> None:
    clip = clip_vision()
    if form == "CLIPVisionModel":
        clip.save_pretrained(tmp_path / "clip")
    elif form == "CLIPModel":
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        whole = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 60}, vision_config=CLIP))
        whole.vision_model.load_state_dict(clip.state_dict())
        whole.save_pretrained(tmp_path / "clip")
    else:
        torch.save(openai_names(clip.state_dict()), tmp_path / "clip")
    model, notes = start(tiny_config(vision=str(tmp_path / "clip")))
    pixels = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        states = clip(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
        expected = clip.post_layernorm(states[2]).numpy()
    with jax.default_matmul_precision("highest"):
        ours = model.vision(jnp.asarray(pixels[:, None]))
    assert np.abs(np.asarray(ours) - expected).max() < LIMIT
    assert any("CLIP's last block" in note for note in notes)


@pytest.mark.parametrize("form", ["RobertaForMaskedLM", "RobertaModel"])
def test_roberta_is_computed(form: str, tmp_path: Path) -> None:
    whole = roberta()
    (whole if form == "RobertaForMaskedLM" else whole.roberta).save_pretrained(tmp_path / "roberta")
    model, notes = start(tiny_config(text=str(tmp_path / "roberta")))
    ids = np.array([[0, 7, 8, 9, 2], [0, 5, 2, 1, 1]], np.int32)
    mask = ids != 1
    with torch.no_grad():
        expected = whole.roberta(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state.numpy()
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(model.text(jnp.asarray(ids), jnp.asarray(mask)))
    assert np.abs(ours - expected)[mask].max() < LIMIT
    assert any("40 → 34 rows (cut_text_positions)" in note for note in notes)


def test_positions_are_resized_to_the_configured_resolution(tmp_path: Path) -> None:
    clip_vision().save_pretrained(tmp_path / "clip")
    config = tiny_config(vision=str(tmp_path / "clip"))
    config.model.vision.image_size = 96
    model, notes = start(config)
    assert model.vision.position_embedding.shape == (37, WIDTH)
    assert any("17 → 37 rows (resize_position_rows)" in note for note in notes)


@pytest.mark.parametrize(("option", "change", "expected"), [
    ("vision", {"width": 64}, "embeddings.class_embedding"),
    ("vision", {"layers": 1}, "unused: encoder.layers.2"),
    ("text", {"vocab_size": 50}, r"embeddings.word_embeddings.weight is \(60, 32\)"),
    ("text", {"max_positions": 50}, "max_positions"),
])  # fmt: skip
def test_encoders_of_another_size_name_option_and_key(option: str, change: dict, expected: str, tmp_path: Path) -> None:
    (clip_vision() if option == "vision" else roberta()).save_pretrained(tmp_path / "weights")
    config = tiny_config(**{option: str(tmp_path / "weights")})
    config.model[option].update(change)
    with pytest.raises(ConversionError, match=f"config.init.{option}(.|\n)*{expected}"):
        start(config)


def test_another_activation_is_refused(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**CLIP | {"hidden_act": "gelu"})).save_pretrained(tmp_path / "clip")
    with pytest.raises(ConversionError, match="hidden_act is 'gelu'"):
        start(tiny_config(vision=str(tmp_path / "clip")))


@pytest.mark.parametrize("option", ["vision", "text"])
def test_other_heads_of_attention_are_refused(option: str, tmp_path: Path) -> None:
    (clip_vision() if option == "vision" else roberta()).save_pretrained(tmp_path / "weights")
    for source in ("weights", "weights/model.safetensors"):
        config = tiny_config(**{option: str(tmp_path / source)})
        config.model[option].heads = 4
        with pytest.raises(ConversionError, match="num_attention_heads is 2, but this model computes with 4"):
            start(config)


def test_one_encoder_in_place_of_the_other_is_named(tmp_path: Path) -> None:
    roberta().save_pretrained(tmp_path / "weights")
    with pytest.raises(ConversionError, match="not a CLIP ViT"):
        start(tiny_config(vision=str(tmp_path / "weights")))


@pytest.mark.parity
def test_training_starts_from_a_converted_folder_as_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str) -> Path:
        raise FileNotFoundError(f"{name}: no connection")

    monkeypatch.setattr("scl_jax.data.tokens._from_hub", unreachable)
    weights = load_file(GOLDEN / "tiny_image.safetensors")
    save_file(weights, tmp_path / "in.safetensors")
    main([str(tmp_path / "in.safetensors"), str(tmp_path / "orbax"), "--heads=4", "--vision_heads=4"])
    main([str(tmp_path / "orbax"), str(tmp_path / "exported")])
    leaves = []
    for source in ("in.safetensors", "orbax", "exported"):
        config = tiny_config(checkpoint=str(tmp_path / source))
        config.model.vision.update(layers=3, heads=4, mlp_width=128)
        config.model.text.update(layers=3, heads=4, mlp_width=128, vocab_size=200, max_positions=20)
        config.model.fusion.update(layers=2, heads=4, mlp_width=128)
        config.model.projection_width = 24
        leaves.append(nnx.to_pure_dict(nnx.state(start(config)[0])))
        config.model.fusion.heads = 2
        if source != "in.safetensors":  # which does not tell
            with pytest.raises(ConversionError, match=r"model\.fusion\.heads"):
                start(config)
    jax.tree.map(np.testing.assert_array_equal, leaves[0], leaves[1])
    jax.tree.map(np.testing.assert_array_equal, leaves[0], leaves[2])
    words = weights["text_transformer.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(leaves[0]["text"]["word_embedding"]["embedding"], words)


@pytest.mark.parametrize("classes", [("yes", "no", "2"), ("no", "yes", "2")])
def test_a_head_is_taken_up_for_the_answers_that_it_lists(classes: tuple[str, ...], tmp_path: Path) -> None:
    config = tiny_config(checkpoint=str(tmp_path / "run"))
    config.task, config.model.answers = "vqa", 3
    _, shapes = parameters.abstract(build.model_maker(config))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    write_parameters(tmp_path / "run", {path: np.asarray(x) for path, x in parameters.flatten(params).items()})
    initial_parameters(config, params, True, classes)  # it lists none
    (tmp_path / "run/classes.json").write_text('["yes", "no", "2"]')
    if classes[0] == "yes":
        initial_parameters(config, params, True, classes)
        return
    with pytest.raises(ConversionError, match="init.checkpoint = .* class 0 is 'yes' there and 'no' in the data"):
        initial_parameters(config, params, True, classes)
    config.task = "entailment"  # the head is left out, whatever it tells apart
    _, shapes = parameters.abstract(build.model_maker(config))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    initial_parameters(config, params, False, ("contradiction", "neutral", "entailment"))
