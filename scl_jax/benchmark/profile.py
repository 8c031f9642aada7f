"""Where the time of a compiled step goes: a trace of the device, summed by the named scopes of the program.

The trace names instructions of the compiled program; the program's text says which scope each comes from. A fusion
counts for the scope of its last instruction.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from scl_jax.training.scopes import scope_of

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)
_CONTAINERS = re.compile(r"(while|call|conditional)[.\d]*$")  # their instructions are listed one by one


def scopes_of_program(text: str) -> dict[str, str]:
    """Instruction → scope, from the text of a compiled program."""
    return {name: scope_of(op_name) for name, op_name in _INSTRUCTION.findall(text)}


def seconds_by_scope(step: Callable[[], Any], program: str, steps: int = 3) -> dict[str, float]:
    """Device seconds of one call of `step` by scope, the longest first; on several threads or devices, their sum.

    Args:
        step: runs the compiled program once and waits for it.
        program: the text of the compiled program.
    """
    scopes = scopes_of_program(program)
    totals: defaultdict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        for file in Path(folder).rglob("*.xplane.pb"):
            for instruction, seconds in _instructions(ProfileData.from_file(str(file))):
                if not _CONTAINERS.match(instruction):
                    totals[scopes.get(instruction, "other")] += seconds / steps
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _instructions(profile: Any) -> Iterator[tuple[str, float]]:
    """(instruction, seconds) of everything that a device ran: on the lines of an accelerator, else of host threads."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and list(plane.lines)]
    for plane in devices or planes:
        lines = list(plane.lines)
        # a line "XLA Ops" sums up what the streams' lines tell, so only one kind is read
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or lines:
            for event in line.events:
                name = next((value for key, value in event.stats if key == "hlo_op"), None)
                if name is not None:
                    yield str(name), event.duration_ns / 1e9
