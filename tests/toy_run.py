"""A very small run of the real program, for tests: toy shards, a tokenizer, a config of seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from scl_jax.config import default_config
from scl_jax.data import builders
from scl_jax.data.tokens import train_tokenizer

ROOT = Path(__file__).parent.parent


def prepare(folder: Path) -> Path:
    """Shards of both toy worlds and a tokenizer."""
    captions: list[str] = []
    for name in ("toy_world/images", "toy_world/videos"):
        builders.prepare(name, folder, train=48, validation=16, test=16)
        source = builders.open_source(name, "train", folder)
        captions += [caption for index in range(len(source)) for caption in source[index]["captions"]]
    train_tokenizer(captions, folder / "tokenizer", 400)
    return folder


def config(data_dir: Path, **changes):
    """All seven objectives on images and clips, a network of width 16; `changes` by dotted name."""
    c = default_config()
    for part in (c.model.vision, c.model.text, c.model.fusion):
        part.update(width=16, heads=2, mlp_width=32, layers=1)
    c.model.vision.update(patch_size=16, image_size=64, max_frames=2)
    c.model.text.update(vocab_size=0, max_positions=34)
    c.model.update(projection_width=16, dtype="float32")
    c.data.update(dir=str(data_dir), tokenizer="", text_length=16, threads=1, prefetch=2)
    c.data.images.update(datasets=("toy_world/images",), batch_size=16, share=0.5, image_size=64)
    c.data.videos.update(datasets=("toy_world/videos",), batch_size=16, share=0.5, image_size=64, frames=2)
    c.objectives.group_size = 4
    c.optimizer.learning_rate = 1e-3
    c.train.update(steps=6, checkpoint_every=2)
    c.evaluate.update(every=0, batch_size=16, rerank=4)
    c.log.update(every=1, console=False, tensorboard=False)
    for name, value in changes.items():
        *parents, last = name.split(".")
        place = c
        for parent in parents:
            place = place[parent]
        place[last] = value
    return c


def run_main(data_dir: Path, workdir: Path, devices: int, *overrides: str) -> subprocess.Popen:
    """`python -m scl_jax.main` on `tests/toy_config.py` in a process of its own."""
    command = [sys.executable, "-m", "scl_jax.main", f"--config={ROOT}/tests/toy_config.py:{data_dir}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache/xla"),  # a restarted run compiles nothing again
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
