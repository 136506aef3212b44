"""Give free pages of the C heap back to the system.

Where the CPU is the compute device, tensors below 32 MiB come from glibc's heap. What is freed there stays
with the process, in holes between what lives longer, and the process grows past what its tensors take.
`malloc_trim` hands whole free pages back. They cost a page fault when they are used again, so it is called
only when the process has grown by `GROWTH_BYTES` since the last time, and only where memory is so scarce that
weights stream. Trimming at every 32 MiB of growth cost a fifth of a short step (bench/LOG.md).

Why not a lower mmap threshold (every large tensor mapped and unmapped by itself): a tenth less memory, but
40 % slower.
"""

from __future__ import annotations

import ctypes
import sys

import psutil

GROWTH_BYTES = 96 * 2**20
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class HeapTrimmer:
    """Does nothing where the C library has no `malloc_trim` (it is glibc's own)."""

    def __init__(self) -> None:
        self._trim = getattr(_LIBC, "malloc_trim", None)
        self._process = psutil.Process()
        self._after_trim_bytes = 0

    def trim_if_grown(self) -> None:
        """Call where much has just been freed."""
        if self._trim is None or self._resident_bytes() < self._after_trim_bytes + GROWTH_BYTES:
            return
        self._trim(0)
        self._after_trim_bytes = self._resident_bytes()

    def _resident_bytes(self) -> int:
        return self._process.memory_info().rss
