"""`pipeline`: how fast the training data of a config come, from its prepared shards to stacked batches on the host."""

from __future__ import annotations

import resource
import time
from typing import Any

from ml_collections import ConfigDict

from scl_jax.config import finalize
from scl_jax.data.pipeline import train_dataset
from scl_jax.data.task_pipeline import task_dataset
from scl_jax.data.tokens import load_tokenizer


def measure(config: ConfigDict, seconds: float) -> dict[str, Any]:
    """Examples a second of one process that does nothing else, and the processor time that an example costs.

    The streams are mixed by their shares and made by `data.threads` threads, as in training. At least `seconds` are
    measured, after as many batches as `data.prefetch` keeps ready.

    Raises:
        FileNotFoundError: shards or tokenizer are missing.
        ValueError: no stream is on, or a record cannot be read.
    """
    data = finalize(config, vocab_size=0).data
    tokenizer = load_tokenizer(data.tokenizer or f"{data.dir}/tokenizer")
    make = train_dataset if config.task == "pretrain" else task_dataset
    batches = iter(make(data, seed=config.seed, tokenizer=tokenizer))
    for _ in range(data.prefetch + 2):
        next(batches)
    examples, before, start = 0, resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        examples += len(next(batches)["pixels"])
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    switches = after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw
    return {
        "threads": data.threads,
        "examples_per_second": examples / spent,
        "processor_milliseconds_per_example": 1e3 * processor / examples,
        "context_switches_per_example": switches / examples,
    }
