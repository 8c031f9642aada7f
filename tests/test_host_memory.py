"""Memory that a step frees serves the next one, in processes of their own: what glibc is told holds until the end."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource
import jax, numpy as np
from scl_jax.host_memory import keep_freed

print(keep_freed())
step = jax.jit(lambda x: jax.lax.optimization_barrier(x + 1).sum())
x = jax.device_put(np.ones((8192, 4096), np.float32))
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and the pages that the last of four steps took."""
    without = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env=without | environment, capture_output=True, text=True, check=True
    )
    kept, pages = done.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own option")
def test_a_step_takes_the_pages_of_the_last_one():
    """128 MB are 32,768 pages of 4 kB; where glibc is told otherwise every step takes them anew."""
    kept, pages = run()
    assert kept and pages < 3_000
    kept, pages = run(GLIBC_TUNABLES="glibc.malloc.mmap_max=65536")
    assert not kept and pages > 20_000
