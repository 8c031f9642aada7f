"""Weights in and out: `python -m scl_jax.convert SOURCE TARGET`.

    python -m scl_jax.convert scl_100k.ckpt weights/scl            the authors' checkpoint, for this library
    python -m scl_jax.convert runs/pretrain exported               a run of this library, for PyTorch
    python -m scl_jax.convert runs/pretrain hub:me/my_model        the same, onto the Hugging Face hub

A folder with checkpoints of this library becomes a PyTorch folder; anything else is read as PyTorch weights of a whole
model. CLIP and RoBERTa need no conversion: `--config.init.vision=… --config.init.text=…` of scl_jax.main read them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from scl_jax.convert.checkpoints import is_run
from scl_jax.convert.sources import HUB, locate, upload
from scl_jax.convert.to_flax import to_flax
from scl_jax.convert.to_torch import to_torch

SIZES = ("heads", "vision_heads", "image_size", "frames")  # of what is written from PyTorch weights


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m scl_jax.convert", description=__doc__, formatter_class=form)
    p.add_argument("source", help="a torch file or folder, a run, or a name on the hub (hub:owner/name)")
    p.add_argument("target", help="the folder to write; hub:owner/name uploads a PyTorch folder")
    p.add_argument("--dry_run", action="store_true", help="only print what would be done")
    p.add_argument("--overwrite", action="store_true", help="replace a folder that this command wrote before")
    p.add_argument("--tokenizer", default="", help="folder or hub name (default: the source's, or roberta-base)")
    p.add_argument("--step", type=int, help="to PyTorch: the checkpoint's step (default: the newest)")
    p.add_argument(
        "--heads", type=int, default=0, help="from PyTorch: in text and fusion attention (default: width/64)"
    )
    p.add_argument("--vision_heads", type=int, default=0, help="from PyTorch: in vision attention (default: width/64)")
    p.add_argument("--image_size", type=int, default=0, help="from PyTorch: the side of images and clips in pixels")
    p.add_argument("--frames", type=int, default=0, help="from PyTorch: temporal rows, and frames of a clip")
    return p


def convert(options: argparse.Namespace) -> None:
    """Does what the command line says."""
    source, target = locate(options.source), options.target
    common: dict[str, Any] = {
        "tokenizer": options.tokenizer,
        "overwrite": options.overwrite,
        "dry_run": options.dry_run,
    }
    from_run = source.is_dir() and is_run(source)
    others, reason = (SIZES, "a run is exported as it is") if from_run else (("step",), "PyTorch weights have no steps")
    needless = [f"--{name}" for name in others if getattr(options, name) != parser().get_default(name)]
    if needless:
        raise ValueError(f"{options.source}: {reason}; leave out {', '.join(needless)}")
    if not from_run:
        if target.startswith(HUB):
            raise ValueError(f"{target}: only PyTorch folders are uploaded; convert to a folder first")
        to_flax(source, Path(target), **{name: getattr(options, name) for name in SIZES}, **common)
    elif target.startswith(HUB):
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / target.split("/")[-1]
            to_torch(source, made, step=options.step, **common)
            if not options.dry_run:
                print(upload(made, target, options.overwrite))
    else:
        to_torch(source, Path(target), step=options.step, **common)


def main(arguments: list[str] | None = None) -> None:
    """The command; errors of input end it with one message and status 1."""
    try:
        convert(parser().parse_args(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
