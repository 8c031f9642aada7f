"""Records that cannot be used: how media are checked, and how what is left out is listed."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scl_jax.data.builders.caption_files import Problem
from scl_jax.data.images import decode_image
from scl_jax.data.video import decode_frames, is_video

LEFT_OUT_FILE = "left_out.jsonl"
_CHECKED_FRAMES = 2  # of a clip: the first and the last
_QUEUE = 32  # files a worker may be ahead, so that only few are held in memory

T = TypeVar("T")
R = TypeVar("R")


class BrokenRecordsError(ValueError):
    """Some records cannot be used, or none can; no data set was written, only the list of them (LEFT_OUT_FILE)."""

    def __init__(self, problems: Sequence[Problem], usable: int, emptied: Sequence[str] = ()) -> None:
        what_to_do = "repair them, or leave them out with --skip_broken" if usable else "none is left to prepare"
        reasons = {problem.reason for problem in problems}
        if not usable and len(reasons) == 1:
            what_to_do += f", all for one reason: {reasons.pop()}"
        if emptied:
            what_to_do = f"nothing is left of split {', '.join(emptied)}: repair them, or prepare only the other splits"
        super().__init__(f"{len(problems):,} of {len(problems) + usable:,} records cannot be used; {what_to_do}")
        self.problems = problems


def why_broken(data: bytes, kind: str) -> str:
    """Why an encoded file of a kind (image, video or media: either) cannot be used; "" when it decodes."""
    try:
        if is_video(data) or (kind == "video" and data.startswith(b"GIF8")):
            if kind == "image":
                return "a video in the place of an image"
            decode_frames(data, _CHECKED_FRAMES)
        elif kind == "video":
            return "no video file of a known kind (mp4, mov, webm, mkv, avi, ogg, flv, asf, gif)"
        else:
            decode_image(data)
    except ValueError as error:
        return str(error)
    return ""


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`function` of every item, in order, by `workers` threads that are only a little ahead."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= workers * _QUEUE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def progress_bar(*, disable: bool = False) -> Progress:
    """A bar on the error stream, which also shows the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=disable)


def write_list(problems: Sequence[Problem], file: Path) -> None:
    """Writes one JSON object a problem: file, line, reason."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ({"file": p.place.file, "line": p.place.line, "reason": p.reason} for p in problems)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
