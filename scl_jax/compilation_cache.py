"""Compiled programs kept on disk: the second start of a run takes seconds where the first took minutes."""

from __future__ import annotations

import os

import jax

SHORTEST = 0.3  # seconds of compilation; what compiles faster is not worth a file


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in `folder`, unless JAX's own variable names another; before anything is compiled.

    folder: "~" is the home; nowhere where it is empty, or where there is no home.
    """
    place = os.path.expanduser(folder)  # leaves "~" where there is no home, as of a container's user without a name
    if place and not place.startswith("~") and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", place)
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
