"""A trained model on the command line, answers as JSON: `python -m scl_jax.inference CHECKPOINT COMMAND …`.

python -m scl_jax.inference runs/quickstart match star.jpg --text "a red star" --text "a blue ring"
python -m scl_jax.inference runs/quickstart rank --text "a red star" pictures/*.jpg -k 3
python -m scl_jax.inference runs/quickstart rank star.jpg --text "a red star" --text "a blue ring"
python -m scl_jax.inference runs/quickstart fill_mask star.jpg --text "a <mask> star"
python -m scl_jax.inference runs/quickstart attention star.jpg --text "a red star" --out attention.png
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scl_jax.inference.answers import free_name, print_json

COMMANDS = {
    "encode": "unit vectors of images, clips and texts",
    "similarity": "cosines of images or clips (rows) with texts (columns)",
    "match": "probability that each text describes its image or clip",
    "rank": "several images for one text, or several texts for one image, the best first",
    "fill_mask": "the likeliest words for <mask> in a text about an image",
    "answer": "answers to a question about an image (--text)",
    "entails": "does an image contradict or entail a statement (--text)?",
    "compare": "is a statement (--text) true of two images?",
    "attention": """draws where a text and its words look in an image or clip. The "mass" of a word is the sum over
             its sub-words of what each, the maximum over heads, gives to all patches: it can exceed 1""",
    "speed": "images and texts encoded a second on this machine, compilation left out",
}
_PICTURE = "attention.png"
_SPEED_ITEMS = 512


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    commands = "\n".join(f"  {name:<11}{meaning}" for name, meaning in COMMANDS.items())
    p = argparse.ArgumentParser(
        prog="python -m scl_jax.inference", description=f"{__doc__}\ncommands:\n{commands}", formatter_class=form
    )
    p.add_argument("checkpoint", help="a work directory, a converted or exported folder, a PyTorch file, a hub name")
    p.add_argument("command", choices=COMMANDS, metavar="command", help=f"one of {', '.join(COMMANDS)}")
    p.add_argument("media", nargs="*", help="image and video files")
    p.add_argument("--text", action="append", default=[], help="a text; may be given several times")
    p.add_argument("-k", type=int, default=5, help="how many answers")
    p.add_argument("--out", help=f"attention: the picture to write, .png or .pdf (default: {_PICTURE} or a free name)")
    p.add_argument("--tokenizer", default="", help="folder or hub name (default: the checkpoint's own)")
    p.add_argument("--step", type=int, help="of a work directory's checkpoint (default: the newest)")
    p.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"), help="of activations")
    p.add_argument("--heads", type=int, default=0, help="of attention, for bare PyTorch files (default: width / 64)")
    p.add_argument("--vision_heads", type=int, default=0, help="the same of the vision encoder")
    return p


def run(options: argparse.Namespace) -> Any:
    """What the command line asks for, as plain data.

    Raises:
        ValueError, OSError: bad input; the message says what to change.
    """
    media, texts, command = options.media, options.text, options.command
    wanted = {"encode": (0, 0), "speed": (0, 0), "compare": (2, 1)}.get(command, (1, 1))
    if len(media) < wanted[0] or len(texts) < wanted[1]:
        raise ValueError(f"{command} takes at least {wanted[0]} file(s) and {wanted[1]} --text")
    from scl_jax.inference import load  # after the checks, which are instant

    names = ("tokenizer", "step", "dtype", "heads", "vision_heads")
    model = load(options.checkpoint, **{name: getattr(options, name) for name in names})
    commands: dict[str, Callable[[], Any]] = {
        "encode": lambda: _encode(model, media, texts),
        "similarity": lambda: model.similarity(media, texts).tolist(),
        "match": lambda: np.atleast_1d(model.match(_one_or_all(media), _one_or_all(texts))).tolist(),
        "rank": lambda: _rank(model, media, texts, options.k),
        "fill_mask": lambda: [
            [{"token": token, "probability": chance} for token, chance in mask]
            for mask in model.fill_mask(texts[0], media[0], options.k)
        ],
        "answer": lambda: [
            {"answer": answer, "probability": chance} for answer, chance in model.answer(media[0], texts[0], options.k)
        ],
        "entails": lambda: model.entails(media[0], texts[0]),
        "compare": lambda: {"true": model.compare(media[0], media[1], texts[0])},
        "attention": lambda: _attention(model, media[0], texts[0], options.out),
        "speed": lambda: _speed(model, _SPEED_ITEMS),
    }
    return commands[command]()


def _one_or_all(given: list[str]) -> str | list[str]:
    return given[0] if len(given) == 1 else given


def _encode(model: Any, media: list[str], texts: list[str]) -> dict[str, dict[str, list[float]]]:
    from scl_jax.inference.media import is_clip

    found: dict[str, dict[str, list[float]]] = {"images": {}, "videos": {}, "texts": {}}
    kinds = {"images": [m for m in media if not is_clip(m)], "videos": [m for m in media if is_clip(m)], "texts": texts}
    for kind, names in kinds.items():
        if names:
            found[kind] = dict(zip(names, getattr(model, f"encode_{kind}")(names).tolist(), strict=True))
    return found


def _rank(model: Any, media: list[str], texts: list[str], k: int) -> list[dict[str, Any]]:
    if len(texts) > 1 and len(media) > 1:
        raise ValueError("rank takes one --text and several files, or one file and several --text")
    is_text = len(texts) == 1
    query, items = (texts[0], media) if is_text else (media[0], texts)
    ranked = model.rank(query, items, k, query_is_text=is_text)
    return [{"item": items[one.index], **dataclasses.asdict(one)} for one in ranked]


def _speed(model: Any, items: int) -> dict[str, Any]:
    """Images are noise of the model's own size, so that decoding does not count; texts are read and tokenized."""
    import jax

    noise = np.random.default_rng(0).integers(0, 255, (items, model.image_size, model.image_size, 3), np.uint8)
    lines = [f"a red star and {number} blue rings" for number in range(items)]
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "items": items}
    for name, encode, given in (("images", model.encode_images, list(noise)), ("texts", model.encode_texts, lines)):
        encode(given)
        start = time.perf_counter()
        encode(given)
        found[f"{name}_per_second"] = round(items / (time.perf_counter() - start), 1)
    return found


def _attention(model: Any, media: str, text: str, out: str | None) -> dict[str, Any]:
    from scl_jax.plots_attention import attention_sheet

    found = model.attention_map(media, text)
    path = attention_sheet(found, out or free_name(Path(_PICTURE)))
    peaks = {"words": found.words, "mass": found.per_word.sum(axis=(1, 2, 3)).tolist()}
    return {"picture": str(path), "patches": list(found.overall.shape), **peaks}


def main(arguments: list[str] | None = None) -> None:
    """The command; errors of input end it with one message and status 1."""
    options = parser().parse_intermixed_args(arguments)  # files may stand behind --text, too
    try:
        with warnings.catch_warnings(record=True) as notes:
            answer = run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for note in notes:
        if issubclass(note.category, UserWarning):
            print(f"note: {note.message}", file=sys.stderr)
    print_json(answer)


if __name__ == "__main__":
    main()
