"""What the TPU compiler must be told before it is loaded, wherever it runs: on a TPU or ahead of time.

The compiler walks chains of fused matrix products recursively, on threads whose stack of 64 KiB is too small for the
full-size step (libtpu 0.0.42: a segmentation fault in FusedSpatialMajorConvolution). Larger stacks change no program.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

STACK = "--fibers_default_thread_stack_size"


def roomy_stacks(env: MutableMapping[str, str] = os.environ) -> None:
    """Gives the compiler's threads 1 MiB of stack, unless LIBTPU_INIT_ARGS already says how much."""
    arguments = env.get("LIBTPU_INIT_ARGS", "")
    if STACK not in arguments:
        env["LIBTPU_INIT_ARGS"] = f"{arguments} {STACK}={2**20}".strip()
