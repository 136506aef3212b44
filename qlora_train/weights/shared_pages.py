"""Pages of RAM that several processes of a machine map: one copy of what is the same for all.

They belong to a file without a name (`memfd_create`, Linux): no folder has to hold it (a container's /dev/shm
is 64 MiB), and they are given back when the last process that maps them ends, however it ends. The process
that makes them says its number and that of the descriptor; the others open /proc/PID/fd/NUMBER.

Why not a mapping of the quantized cache's own files: those pages belong to the page cache. Where they are not
pinned the system may drop them, and a step then waits for the disk; and the kernel refuses to pin pages of
most file systems for a device to keep, while those of a memfd can be.
"""

from __future__ import annotations

import mmap
import os


def can_share() -> bool:
    """Whether the system has such files at all."""
    return hasattr(os, "memfd_create")


def make_pages(num_bytes: int) -> tuple[int, mmap.mmap]:
    """Pages filled with 0 and the descriptor to find them by, which the caller closes."""
    descriptor = os.memfd_create("qlora_train", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    return descriptor, _map(descriptor, num_bytes)


def open_pages(process: int, descriptor: int, num_bytes: int) -> mmap.mmap:
    """Those that another process has made and still has the descriptor of. OSError where the system does not
    let this process see them."""
    opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return _map(opened, num_bytes)
    finally:
        os.close(opened)


def _map(descriptor: int, num_bytes: int) -> mmap.mmap:
    return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED)
