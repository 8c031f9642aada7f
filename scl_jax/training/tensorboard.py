"""Numbers for TensorBoard, written by the thread that has them.

tensorboardX's own writer hands events to a thread of its own. When the disk is full that thread dies, and then the run
waits for ever for it to take the next event; here the error comes up where it can be told.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

FLUSH = 60  # seconds


class EventFile:
    """An event file in `folder`, made when missing; `after`: TensorBoard drops what it knows of later steps."""

    def __init__(self, folder: Path, after: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter  # only where wanted: it takes a second to import
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        messages: Any = event_pb2  # made when it is imported, so that no type is known before
        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = messages.Event, scalar
        self._writer = EventsWriter(str(folder / "events"))
        if after is not None:
            begin = messages.SessionLog(status=messages.SessionLog.START)
            self._writer.write_event(messages.Event(step=after + 1, session_log=begin))
        self._writer.flush()
        self._flushed = time.monotonic()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Writes the numbers of a step, and forces them to the disk now and then."""
        now = time.time()  # for TensorBoard's axis of time alone
        for name, value in numbers.items():
            self._writer.write_event(self._event(wall_time=now, step=step, summary=self._scalar(name, value)))
        if time.monotonic() - self._flushed > FLUSH:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
