"""What makes the host wait for the device: counted by kind, with file and line in the program.

A training step that reads one number back waits once for everything that is queued; one that does so in each
layer leaves the GPU idle in each layer. On a CPU none of it shows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from simulated_gpu import places

Counts = Counter[tuple[str, str]]
"""(what, "file:line") -> how often."""


@dataclass
class HostReads:
    """Three kinds of waiting, because a program promises something else of each."""

    values: Counts = field(default_factory=Counter)
    """Values that came to the host: `.item()`, `bool()`, `nonzero`, copies to the host that wait."""
    copies: Counts = field(default_factory=Counter)
    """Copies to the device that the host waits for: from pageable memory, or not `non_blocking`."""
    synchronizations: Counts = field(default_factory=Counter)
    """Waits that the program asked for: of a device, a stream, an event."""

    def note_value(self, what: str) -> None:
        self.values[what, places.words(places.caller())] += 1

    def note_copy(self, what: str) -> None:
        self.copies[what, places.words(places.caller())] += 1

    def note_synchronization(self, what: str) -> None:
        self.synchronizations[what, places.words(places.caller())] += 1

    def clear(self) -> None:
        """Begin to count anew."""
        for counts in (self.values, self.copies, self.synchronizations):
            counts.clear()
