"""A very small checkpoint with random weights and every head, for tests of what uses a trained model."""

from __future__ import annotations

import io
import json
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import toy_run
from PIL import Image

from scl_jax.config import finalize
from scl_jax.convert.checkpoints import write_parameters
from scl_jax.convert.full_model import model_shapes
from scl_jax.convert.torch_config import HEADS, SCLConfig
from scl_jax.data.builders import toy_world
from scl_jax.data.tokens import train_tokenizer

PRETRAINING = ("contrastive", "matching", "masked_language")
ANSWERS = ("red", "green", "blue", "star", "ring")


def write_run(folder: Path, heads: tuple[str, ...] = tuple(HEADS), seed: int = 0) -> Path:
    """A work directory: config.json, checkpoints/0, a tokenizer; weights large enough that inputs matter."""
    captions = [caption for record in scenes("images", 30) + scenes("videos", 6) for caption in record["captions"]]
    tokenizer = train_tokenizer(captions, folder / "data" / "tokenizer", 330)
    sizes = SCLConfig(
        width=16, heads=2, mlp_width=32, vision_width=16, vision_heads=2, vision_mlp_width=32, vision_layers=1,
        text_layers=1, fusion_layers=1, patch_size=16, image_size=64, max_frames=2, vocab_size=tokenizer.vocab_size,
        max_positions=34, token_types=3 if "nlvr2" in heads else 2, projection_width=16, answers=len(ANSWERS),
        with_heads=heads,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    flat = {path: rng.normal(0, 0.25, shape).astype(np.float32) for path, shape in model_shapes(sizes).items()}
    flat |= {path: 1 + value for path, value in flat.items() if path.endswith(".scale")}
    if "contrastive" in heads:
        flat["contrastive.temperature"] = np.float32(0.07)
    run = folder / "run"
    write_parameters(run, flat)
    config = finalize(toy_run.config(folder / "data"), tokenizer.vocab_size)
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "classes.json").write_text(json.dumps(ANSWERS))
    return run


def scenes(kind: str, count: int, split: str = "test") -> list[dict]:
    """Records of the toy world, without shards; phrases need `boxes` and `things` as they are."""
    return list(toy_world.records(kind, split, count, 0))


def png(width: int = 64, height: int = 48, color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def gif(frames: int = 3) -> bytes:
    """An animation whose frames get brighter."""
    file = io.BytesIO()
    pictures = [Image.new("RGB", (40, 30), (60 + 60 * i,) * 3) for i in range(frames)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A picture that claims a size and holds nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def free_port() -> int:
    """A port of this machine that nothing listens to."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]
