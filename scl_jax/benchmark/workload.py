"""What is timed: a config's step on random bytes and tokens; neither shards nor a tokenizer are needed.

Axes: B batch, F frames, H W pixels, L text tokens.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from scl_jax import build, remat
from scl_jax.config import active_streams, finalize
from scl_jax.config_check import check
from scl_jax.tasks.pretrain import Pretraining
from scl_jax.training import sharding
from scl_jax.training.state import TrainState, init_state
from scl_jax.types import Batch

DEFAULT_VOCABULARY = 1000  # where the config leaves its size to the tokenizer
SPECIAL_TOKENS = 5


def read_config(file: Path) -> ConfigDict:
    """What `get_config()` of a config file gives.

    Raises:
        FileNotFoundError: there is no such Python file.
    """
    spec = importlib.util.spec_from_file_location("benchmark_config", file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"--config={file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def complete(config: ConfigDict, stream: str, batch_size: int) -> ConfigDict:
    """The checked config with `batch_size` rows of one stream, "images" or "videos" (0: the config's batch size).

    Raises:
        ConfigError: options that cannot work.
    """
    config = finalize(config, config.model.text.vocab_size or DEFAULT_VOCABULARY)
    for name in active_streams(config):
        config.data[name].share = float(name == stream)
    config.data[stream].share = 1.0
    if not any(config.data[stream].datasets):
        config.data[stream].datasets = ("random",)
    if batch_size:
        config.data[stream].batch_size = batch_size
        config.objectives.group_size = min(config.objectives.group_size, batch_size // config.train.accumulate)
    config.evaluate.batch_size = jax.device_count()  # nothing is evaluated
    check(config, config.model.text.vocab_size, jax.device_count(), jax.process_count())
    return config


def random_arrays(config: ConfigDict, stream: str, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The fields of `Batch`: noise for pixels, texts of full length whose every token is a word."""
    rng = np.random.default_rng(seed)
    s, length = config.data[stream], config.data.text_length
    ids = rng.integers(SPECIAL_TOKENS, config.model.text.vocab_size - 1, (rows, length), dtype=np.int32)
    ids[:, 0], ids[:, -1] = 0, 2
    words = np.arange(-1, length - 1, dtype=np.int32)
    words[-1] = -1
    return {
        "pixels": rng.integers(0, 256, (rows, s.frames, s.image_size, s.image_size, 3), dtype=np.uint8),
        "token_ids": ids,
        "token_mask": np.ones((rows, length), bool),
        "word_ids": np.tile(words, (rows, 1)),
        "weight": np.ones(rows, np.float32),
        "item_id": np.arange(rows, dtype=np.int32),
    }


class Training:
    """The training step of a config, compiled for one stream with every objective of its last step.

    Attributes:
        rows: samples of a batch, over all devices.
        remat: the policy of the step, where the config leaves it open the one that fits.
        compile_seconds: lowering and compilation; short where the persistent cache holds the program.
    """

    def __init__(self, config: ConfigDict, stream: str):
        self.rows: int = config.data[stream].batch_size
        self.mesh = sharding.make_mesh(**config.mesh)
        vocab_size = config.model.text.vocab_size
        self.task: Pretraining = build.pretraining(config, vocab_size, mask_id=vocab_size - 1)
        config = remat.resolve(config, self.task, [stream], self.mesh)
        self.remat: str = config.model.remat
        graph, tx, self.state = init_state(
            build.model_maker(config), build.optimizer_maker(config), self.mesh, config.seed, config.optimizer.ema > 0
        )
        self.batch = Batch(**sharding.global_batch(random_arrays(config, stream, self.rows), self.mesh))
        self.active = self.task.active(config.train.steps)
        self.function = build.train_step(config, self.task, graph, tx, self.state, self.mesh)
        start = time.perf_counter()
        self.compiled = self.function.lower(self.state, self.batch, self.active).compile()
        self.compile_seconds = time.perf_counter() - start

    def shapes(self) -> tuple[TrainState, Batch]:
        """State and batch without their numbers."""
        return jax.eval_shape(lambda *xs: xs, self.state, self.batch)

    def run(self) -> dict[str, Any]:
        """One step; returns its metrics once the device has finished."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return metrics
