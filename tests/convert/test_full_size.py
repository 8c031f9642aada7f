"""At full size, random weights: Hugging Face's modules and our PyTorch model against ours, and a 4.4 GB checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden_case import GOLDEN
from transformers import CLIPVisionConfig, CLIPVisionModel, RobertaConfig, RobertaModel

from scl_jax import build
from scl_jax.config import default_config
from scl_jax.convert.encoders import read_clip, read_roberta
from scl_jax.convert.full_model import read_model
from scl_jax.convert.torch_config import SCLConfig
from scl_jax.convert.torch_model import SCL, load
from scl_jax.models import parameters

pytestmark = pytest.mark.slow
LIMIT = 5e-5
MEASURE = (
    "import sys\nfrom scl_jax.convert.__main__ import main\nmain(sys.argv[1:])\n"
    "status = open('/proc/self/status').read()\n"  # getrusage counts the process that started this one, too
    "print('peak KiB', status.split('VmHWM:')[1].split()[0])"
)


def full_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {n: tuple(s) for n, s in json.loads((GOLDEN / "state_dict_names_full.json").read_text())[name].items()}


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    random, weights = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        weights[name] = random.normal(0, 0.02, shape).astype(np.float32)
        if name.endswith("weight") and len(shape) == 1:  # LayerNorms
            weights[name] += 1
    weights["cl_temp"] = np.float32(0.07).reshape(())
    return {n: np.zeros(s, np.int64) if n.endswith("position_ids") else weights[n] for n, s in shapes.items()}


def model_of(config, flat: dict[str, np.ndarray]):
    """Ours in float32; parameters that `flat` lacks are zeros."""
    config.model.dtype = "float32"
    graph, shapes = parameters.abstract(build.model_maker(config))
    every = {
        path: jnp.asarray(flat.get(path, np.zeros(x.shape, x.dtype))) for path, x in parameters.flatten(shapes).items()
    }
    return parameters.merge(graph, parameters.unflatten(every))


def full_config_shapes() -> dict[str, tuple[int, ...]]:
    shapes = parameters.abstract(build.model_maker(default_config()))[1]
    return {path: tuple(x.shape) for path, x in parameters.flatten(shapes).items()}


def compare(stage: str, ours, theirs: torch.Tensor) -> None:
    difference = float(np.abs(np.asarray(ours) - theirs.detach().numpy()).max())
    print(f"{stage}: max abs difference {difference:.1e}")
    assert difference < LIMIT, stage


def test_clip_of_hugging_face() -> None:
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(image_size=288, patch_size=16)).eval()
    flat, _ = read_clip({n: x.numpy() for n, x in clip.state_dict().items()}, full_config_shapes())
    model = model_of(default_config(), flat)
    pixels = np.random.default_rng(0).normal(size=(1, 288, 288, 3)).astype(np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        states = clip(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
        x = model.vision.norm_pre(model.vision.embed(jnp.asarray(pixels[:, None]))[:, 0])
        compare("CLIP ln_pre", x, states[0])
        _, blocks = model.vision.blocks(x, lambda block, x, _: block(x, [(1, 1, x.shape[1])]), return_layers=True)
        for i in range(11):
            compare(f"CLIP block {i}", blocks[i], states[i + 1])
        compare("CLIP ln_post", model.vision(jnp.asarray(pixels[:, None])), clip.post_layernorm(states[11]))


def test_roberta_of_hugging_face() -> None:
    torch.manual_seed(0)
    sizes = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    roberta = RobertaModel(sizes, add_pooling_layer=False).eval()
    flat, _ = read_roberta({n: x.numpy() for n, x in roberta.state_dict().items()}, full_config_shapes())
    model = model_of(default_config(), flat)
    ids = np.random.default_rng(0).integers(3, 50000, (2, 50))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        states = roberta(torch.from_numpy(ids), output_hidden_states=True).hidden_states
        x = model.text.embed(jnp.asarray(ids))
        compare("RoBERTa embeddings", x, states[0])
        mask = jnp.ones(ids.shape, bool)
        _, layers = model.text.layers(x, lambda layer, x, key: layer(x, mask, key=key), return_layers=True)
        for i in range(12):
            compare(f"RoBERTa layer {i}", layers[i], states[i + 1])


@pytest.mark.parametrize(
    ("name", "frames"), [("image_pretrain_288", 1), ("video_pretrain_224", 4), ("video_pretrain_224", 1)]
)
def test_our_pytorch_model_end_to_end(name: str, frames: int) -> None:
    weights = random_weights(full_shapes(name))
    flat, _, _ = read_model(weights)
    config, size = default_config(), int(name[-3:])
    config.model.vision.image_size = size
    model, twin = model_of(config, flat), SCL(SCLConfig.infer({n: x.shape for n, x in weights.items()})).eval()
    load(twin, weights)
    random = np.random.default_rng(1)
    pixels = random.normal(size=(1, frames, size, size, 3)).astype(np.float32)
    ids, mask = random.integers(3, 50000, (1, 50)), np.arange(50)[None] < 40
    ids[~mask] = 1
    ours_pixels, ours_ids, ours_mask = map(jnp.asarray, (pixels, ids, mask))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        vision, text = (
            twin.encode_image(torch.from_numpy(pixels)),
            twin.encode_text(torch.from_numpy(ids), torch.from_numpy(mask)),
        )
        fused = twin.fuse(text, vision)
        compare(f"{name} F={frames} vision", model.vision(ours_pixels), vision.tokens)
        compare(f"{name} F={frames} text", model.text(ours_ids, ours_mask), text.tokens)
        x, y = model.encode_text(ours_ids, ours_mask), model.encode_image(ours_pixels)
        ours = model.fuse(x, ours_mask, y, frames)
        compare(f"{name} F={frames} fused text", ours.text, fused.text)
        compare(f"{name} F={frames} fused image", ours.image, fused.vision)
        joint = model.fusion.joint(ours)
        compare(f"{name} F={frames} joint", joint, fused.joint)
        compare(f"{name} F={frames} matching", model.matching(joint), twin.matching_logits(fused))
        compare(f"{name} F={frames} language", model.masked_language(ours.text), twin.language_logits(fused.text))
        compare(f"{name} F={frames} project image", model.project_image(y, frames), twin.project_image(vision))
        compare(f"{name} F={frames} project text", model.project_text(x), twin.project_text(text))


def test_a_lightning_checkpoint_of_4_gigabytes(tmp_path: Path) -> None:
    shapes = full_shapes("image_pretrain_288")
    state = {n: torch.from_numpy(np.array(x)) for n, x in random_weights(shapes).items()}
    moments = {
        i: {"step": 1, "exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
        for i, x in enumerate(x for x in state.values() if x.is_floating_point())
    }
    torch.save({"state_dict": state, "optimizer_states": [{"state": moments, "param_groups": []}]}, tmp_path / "a.ckpt")
    size = (tmp_path / "a.ckpt").stat().st_size
    del state, moments
    begin = time.monotonic()
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.ckpt"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr[-2000:]
    gigabytes = int(done.stdout.split("peak KiB")[1]) / 2**20
    print(f"\n{size / 1e9:.2f} GB in {seconds:.1f} s with a peak of {gigabytes:.2f} GiB\n{done.stdout}")
    assert size > 4e9 and seconds < 90 and gigabytes < 6
