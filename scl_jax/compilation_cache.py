"""Compiled programs kept on disk: the second start of a run takes seconds where the first took minutes."""

from __future__ import annotations

import os
from pathlib import Path

import jax

SHORTEST = 0.3  # seconds of compilation; what compiles faster is not worth a file


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in `folder` ("~" is the home; empty: nowhere), unless JAX's own variable names another.

    To be called before anything is compiled.
    """
    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
