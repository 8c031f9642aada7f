"""What a conversion did, as the lines that the command prints."""

from __future__ import annotations

import dataclasses
from collections import Counter


@dataclasses.dataclass
class Summary:
    """Counts and names of one conversion."""

    source: str
    target: str
    tensors: int = 0  # mapped ones
    numbers: int = 0  # in the parameters
    resized: list[str] = dataclasses.field(default_factory=list)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)  # name → reason
    initialised: list[str] = dataclasses.field(default_factory=list)
    checksum: str = ""

    def lines(self) -> list[str]:
        """One fact a line."""
        reasons = Counter(self.dropped.values())
        found = [
            f"{self.source} → {self.target}",
            f"mapped: {self.tensors} tensors, {self.numbers / 1e6:.2f} M numbers",
        ]
        found += [f"resized: {line}" for line in self.resized]
        for reason, count in sorted(reasons.items()):
            first = next(name for name, why in self.dropped.items() if why == reason)
            more = "" if count == 1 else f" and {count - 1} more"
            found.append(f"dropped: {first}{more}: {reason}")
        found += [f"initialised: {line}" for line in self.initialised]
        return [*found, f"checksum: sha256 {self.checksum}"]
