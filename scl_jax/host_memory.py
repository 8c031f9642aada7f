"""Memory of a step that the CPU computes: what one step frees serves the next.

glibc returns large blocks to the system as soon as they are freed. A step at full size takes gigabytes, and the kernel
would find and clear their pages anew each time: a tenth of the step (benchmarks/RESULTS.md, "A run").
"""

from __future__ import annotations

import ctypes
import os
import sys

import jax

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
NEVER = -1
HEAP = 64 << 20  # of a thread that is not the main one; where it has become empty it goes but for M_TOP_PAD
OPTIONS = ("mmap_max", "mmap_threshold", "trim_threshold")  # of GLIBC_TUNABLES, which say the same


def keep_freed() -> bool:
    """Has glibc keep what this process frees (mallopt(3)), where a CPU computes; before JAX's first use.

    Blocks larger than 64 MB are kept in the heap of the main thread only, so steps run in the thread that calls them.
    Little is lost by that: a step takes every core, and data are read by threads of their own.

    Returns:
        Whether it does. Not beside an accelerator, without glibc, or where GLIBC_TUNABLES has one of `OPTIONS`.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or any(f"glibc.malloc.{option}=" in tunables for option in OPTIONS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # read when the backend starts, so before it is asked
    if jax.default_backend() != "cpu":
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, NEVER), mallopt(M_TOP_PAD, HEAP)])
