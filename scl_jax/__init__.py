"""Vision-language pre-training with semantic completion learning in JAX.

`scl_jax.load(…)` gives a trained model for one's own pictures, clips and texts; it is imported when it is first asked
for, so that data workers, which need no JAX, start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scl_jax.inference import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from scl_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
