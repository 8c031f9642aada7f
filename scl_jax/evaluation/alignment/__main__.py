"""Alignment scores of a checkpoint: `python -m scl_jax.evaluation.alignment CHECKPOINT …`.

    python -m scl_jax.evaluation.alignment runs/quickstart --dataset=toy_world/images --data=data
    python -m scl_jax.evaluation.alignment scl.ckpt --align_bench=ALIGN-BENCH --out=alignment.json

Prints the summary as JSON; `--out` keeps the scores of every image, `--pictures` draws the first few attention maps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scl_jax.evaluation.alignment.files import align_bench, toy_examples
from scl_jax.evaluation.alignment.scores import Example, score_example, summarize


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        prog="python -m scl_jax.evaluation.alignment", description=__doc__, formatter_class=form
    )
    p.add_argument("checkpoint", help="what scl_jax.load takes")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--align_bench", default="", help="a folder with images/ and pkls/; see docs/data.md")
    source.add_argument("--dataset", default="toy_world/images", help="toy_world/images or toy_world/videos")
    p.add_argument("--data", default="data", help="where prepared shards lie")
    p.add_argument("--split", default="test", help="of the toy world")
    p.add_argument("--max_items", type=_count, default=0, help="images to score; 0: all")
    p.add_argument("--drop_large_masks", action="store_true", help="as the authors' script does")
    p.add_argument("--out", default="", help="a JSON file for the summary and the scores of every image")
    p.add_argument("--pictures", type=_count, default=0, help="attention maps to draw, into a folder named as --out")
    p.add_argument("--tokenizer", default="", help="folder or hub name (default: the checkpoint's own)")
    return p


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def examples(options: argparse.Namespace, video_frames: int) -> Iterator[Example]:
    """What the command line names."""
    if options.align_bench:
        return align_bench(options.align_bench, options.max_items)
    if options.dataset not in ("toy_world/images", "toy_world/videos"):
        raise ValueError(f"--dataset={options.dataset}: only toy_world/images and toy_world/videos hold boxes")
    frames = 1 if options.dataset.endswith("images") else video_frames
    return toy_examples(options.dataset, options.split, options.data, frames, options.max_items)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Scores everything and returns the summary.

    Raises:
        ValueError, OSError: bad input; the message says what to change.
    """
    out, results = Path(options.out or "alignment.json"), []
    if out.is_dir():  # said before hours of work, not after
        raise ValueError(f"--out={out} is a folder: name a JSON file")
    pictures = out.with_suffix("") if out.suffix else out.with_name(f"{out.name}_pictures")
    from scl_jax.inference import load  # this command stands above both rooms
    from scl_jax.plots_attention import attention_sheet

    model = load(options.checkpoint, tokenizer=options.tokenizer)
    for number, example in enumerate(examples(options, model.video_frames)):
        attention = model.attention_map(example.media, example.caption)
        results.append(score_example(attention, example, options.drop_large_masks))
        if number < options.pictures:
            attention_sheet(attention, pictures / f"{example.name}.png")
    summary = summarize(results)
    if options.out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"summary": summary, "images": results}, indent=2, ensure_ascii=False) + "\n")
    return summary


def main(arguments: list[str] | None = None) -> None:
    """The command; errors of input end it with one message and status 1."""
    options = parser().parse_args(arguments)
    try:
        from scl_jax.inference.answers import print_json

        print_json(run(options))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
