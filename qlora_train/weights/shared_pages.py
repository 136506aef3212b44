"""Pages of RAM that several processes of a machine map, so that they store the same weights once.

They belong to a file without a name (`memfd_create`, Linux), which needs no folder (a container's /dev/shm is
64 MiB), and are freed when the last process that maps them ends, however it ends. The process that makes them
sends its process id and the file descriptor; the others open /proc/PID/fd/DESCRIPTOR.

Why not map the quantized cache's own files: those pages belong to the page cache. The system may drop them
where they are not pinned, and a step then waits for the disk; and the kernel refuses long-term pinning of
pages of most file systems, while those of a memfd can be pinned.
"""

from __future__ import annotations

import mmap
import os


def can_share() -> bool:
    """Whether the system has `memfd_create`."""
    return hasattr(os, "memfd_create")


def make_pages(num_bytes: int) -> tuple[int, mmap.mmap]:
    """(file descriptor, pages), the pages filled with 0. The caller closes the descriptor."""
    descriptor = os.memfd_create("qlora_train", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    return descriptor, _map(descriptor, num_bytes)


def open_pages(process: int, descriptor: int, num_bytes: int) -> mmap.mmap:
    """Map pages that another process has made and whose descriptor it still holds. Raises OSError if the
    system denies access."""
    opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return _map(opened, num_bytes)
    finally:
        os.close(opened)


def _map(descriptor: int, num_bytes: int) -> mmap.mmap:
    return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED)
