"""Orbax → PyTorch: a run becomes a folder that `torch_model.SCL.from_folder` and the reference's names read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from scl_jax.config import config_of_run
from scl_jax.convert.checkpoints import beside, check_target, checksum, read_parameters
from scl_jax.convert.inputs import MODEL_TYPE, check_tokenizer, inputs_of
from scl_jax.convert.rules import ConversionError, flax_to_torch
from scl_jax.convert.summary import Summary
from scl_jax.convert.torch_config import SCLConfig
from scl_jax.convert.torch_files import write_safetensors
from scl_jax.data.tokens import load_run_tokenizer, load_tokenizer

EXPORTED = ("model.safetensors", "config.json", "README.md")  # in every folder that is written here
CARD = """---
license: other
library_name: pytorch
tags: [vision-language, semantic-completion-learning, scl_jax]
---
# {name}

A vision-language model trained with semantic completion learning (SCL, GLSCL), exported from scl_jax at step {step}.

- vision: ViT, {sizes.vision_layers} blocks of width {sizes.vision_width}, patches of {sizes.patch_size} px, position \
table for {sizes.image_size} px, up to {sizes.max_frames} frames
- text: {sizes.text_layers} layers of width {sizes.width}, {sizes.vocab_size} tokens
- fusion: {sizes.fusion_layers} layers; heads: {heads}
- {millions:.1f} M numbers, sha256 of the parameters `{checksum}`

```python
from scl_jax.convert.torch_model import SCL  # pip install "scl_jax[torch]"

model = SCL.from_folder("{name}").eval()
text, vision = model.encode_text(token_ids, token_mask), model.encode_image(pixels)  # pixels: uint8 (B, F, H, W, 3)
is_match = model.matching_logits(model.fuse(text, vision)).softmax(-1)[:, 1]
```

The names in `model.safetensors` are those of the authors' PyTorch checkpoints.{tokenizer_note}
"""


def to_torch(
    run: Path,
    target: Path,
    *,
    step: int | None = None,
    tokenizer: str = "",
    overwrite: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Summary:
    """Writes <target>/model.safetensors, config.json, the tokenizer and README.md from a run or a converted folder.

    Args:
        step: of the checkpoint; None: the newest.
        tokenizer: a folder or hub name; empty: the run's, which is left out, with a line, where it cannot be found or
            has more tokens than the model.

    Raises:
        ConversionError, FileNotFoundError, FileExistsError, OSError: nothing is written.
    """
    sources = [run, *filter(None, [tokenizer])]
    if not dry_run:
        check_target(target, overwrite, EXPORTED, sources)
    config = config_of_run(run)
    flat, step = read_parameters(run, step)
    tensors = flax_to_torch(flat)
    sizes = SCLConfig.infer({name: x.shape for name, x in tensors.items()})
    model = config.model
    sizes = dataclasses.replace(
        sizes,
        heads=model.text.heads,
        vision_heads=model.vision.heads,
        dropout=model.dropout,
        initial_temperature=model.initial_temperature,
    )
    count = sum(x.size for x in flat.values())
    summary = Summary(f"{run} (step {step})", str(target), len(tensors), count, checksum=checksum(flat))
    for line in summary.lines():
        say(line)
    if dry_run:
        return summary
    name = tokenizer or config.data.tokenizer or f"{config.data.dir}/tokenizer"
    note = ""
    with beside(target, overwrite, sum(x.nbytes for x in tensors.values()), EXPORTED, sources) as folder:
        write_safetensors(
            folder / "model.safetensors", tensors, {"format": "pt", "parameters_sha256": summary.checksum}
        )
        settings = {"model_type": MODEL_TYPE, **sizes.to_dict(), "inputs": dataclasses.asdict(inputs_of(config))}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        try:
            found = load_tokenizer(name) if tokenizer else load_run_tokenizer(run, name)
            check_tokenizer(found, sizes.vocab_size)
            found.save(folder)
        except (FileNotFoundError, ConversionError) as error:
            if tokenizer:
                raise
            if isinstance(error, FileNotFoundError):
                note = f" The tokenizer is not included: it is {name}."
            say(f"tokenizer: left out ({error}); --tokenizer=FOLDER adds one")
        card = CARD.format(
            name=target.name, step=step, sizes=sizes, heads=", ".join(sizes.with_heads), millions=count / 1e6,
            checksum=summary.checksum, tokenizer_note=note,
        )  # fmt: skip
        (folder / "README.md").write_text(card)
        if (run / "classes.json").exists():  # the answers of a head
            shutil.copy(run / "classes.json", folder)
    return summary
