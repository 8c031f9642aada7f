"""Files of a work directory that survive a kill at any moment.

JSON is written whole or not at all; JSON lines are appended, and mended when the last one was cut short.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path | str, content: Any) -> None:
    """Writes JSON so that a reader finds the old file or the new one, never half of it; no number becomes NaN."""
    _replace(Path(path), json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that a kill cut short is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is no JSON object.
    """
    records = []
    for number, line in enumerate(_whole_lines(Path(path)), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}); remove or mend the line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object; remove or mend the line")
        records.append(record)
    return records


class JsonLines:
    """Appends one JSON object a line and flushes it; a last line that a kill cut short is dropped on opening."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if self.path.exists():
            whole = "".join(f"{line}\n" for line in _whole_lines(self.path))
            if len(whole.encode()) != self.path.stat().st_size:
                _replace(self.path, whole)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; numbers that are not finite become null, as JSON has no other word for them."""
        self._file.write(_line(record))
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the records of later steps: a run that restarts from a checkpoint of `step` writes them again."""
        self._file.close()
        _replace(self.path, "".join(_line(record) for record in read_lines(self.path) if record["step"] <= step))
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _whole_lines(path: Path) -> list[str]:
    """The lines that end in a line break; what follows the last one was being written when the process died."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _replace(path: Path, text: str) -> None:
    """Replaces a file in one motion: written beside it, forced to the disk, renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
