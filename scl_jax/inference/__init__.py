"""A trained model on one's own pictures, clips and texts.

    model = scl_jax.load("runs/quickstart")
    model.similarity(["star.jpg", "ring.jpg"], ["a red star", "a blue ring"])

`weights.py` finds parameters, sizes and tokenizer whatever they were saved as; `media.py` and `texts.py` turn what is
handed in into arrays; `network.py` holds the compiled functions; `model.py` is what users call.
"""

from scl_jax.inference.media import MediaError
from scl_jax.inference.model import Model, Ranked, load
from scl_jax.inference.network import MissingHeadError
from scl_jax.inference.texts import AttentionMap, TextError

__all__ = ["AttentionMap", "MediaError", "MissingHeadError", "Model", "Ranked", "TextError", "load"]
