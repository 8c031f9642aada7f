"""How commands leave their answers: JSON for whoever reads it, pictures beside those that are there."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any


def print_json(answer: Any) -> None:
    """Prints an answer; ends the command quietly where the reader has left, as `head` does once it has its lines."""
    try:
        text = json.dumps(answer, indent=2, ensure_ascii=False)
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # names of files that are no text cannot be printed
            text = json.dumps(answer, indent=2)
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it closes
        sys.exit(0)


def free_name(path: Path) -> Path:
    """The path itself, or that with the first number from 2 on that is not taken: picture.png, picture_2.png, …"""
    numbered = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())
