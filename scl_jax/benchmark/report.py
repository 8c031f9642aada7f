"""Results of a benchmark as a table on the screen and as JSON."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpu_cores": cores,
        "load_average": os.getloadavg()[0],  # of the minute before: other work on the machine shows here
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def show(title: str, rows: dict[str, Any]) -> None:
    """Prints a two-column table."""
    table = Table("what", "value", title=title, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def write(path: str, results: dict[str, Any]) -> None:
    """Writes results and the machine as JSON; an empty path writes nothing."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
