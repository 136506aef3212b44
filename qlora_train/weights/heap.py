"""Returns free pages of the C heap to the system.

Where the CPU is the compute device, tensors below 32 MiB come from glibc's heap. Freed blocks stay with the
process, between blocks that live longer, so the process grows beyond the size of its tensors. `malloc_trim`
returns whole free pages. Each costs a page fault when it is used again, so it is called only when the process
has grown by `GROWTH_BYTES` since the last time, and only where memory is so scarce that weights stream.
Trimming at every 32 MiB of growth cost a fifth of a short step (tests/benchmarks/LOG.md).

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
    """Trims the heap of this process; does nothing where the C library has no `malloc_trim` (only glibc
    has it)."""

    def __init__(self) -> None:
        self._trim = getattr(_LIBC, "malloc_trim", None)
        self._process = psutil.Process()
        self._after_trim_bytes = 0

    def trim_if_grown(self) -> None:
        """Trim if the process has grown by `GROWTH_BYTES`. Call it where much memory has just been freed."""
        if self._trim is None or self._resident_bytes() < self._after_trim_bytes + GROWTH_BYTES:
            return
        self._trim(0)
        self._after_trim_bytes = self._resident_bytes()

    def _resident_bytes(self) -> int:
        return self._process.memory_info().rss
