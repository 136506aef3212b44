"""Give free pages of the C heap back to the system.

Where the CPU is the compute device, tensors below 32 MiB come from glibc's heap. What is freed there stays
with the process, in holes between what lives longer, and the process grows past what its tensors take: 1.33
GB instead of 0.98 for a 1.1B base that streams from disk. `malloc_trim` hands whole free pages back. They
cost a page fault when they are used again, so it is called now and then, not at every turn, and only where
memory is so scarce that weights stream: every second layer costs about 5 % of a step.

Why not a lower mmap threshold (every large tensor mapped and unmapped by itself): 0.93 GB, but 40 % slower.
"""

from __future__ import annotations

import ctypes
import sys

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def give_back_free_pages() -> None:
    """Does nothing where the C library has no `malloc_trim` (it is glibc's own)."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)
