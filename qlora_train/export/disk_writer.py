"""Writes a large file in the background, bypassing the system's page cache.

An ordinary write copies into the kernel's pages; the disk starts later, and fsync at the end waits for most
of it. With O_DIRECT the disk reads the caller's memory: a thread that waits for it uses no core, so a block
is written while the next is computed, and little is left to sync.

    buffer 0   filled | written          | filled | written     ...
    buffer 1          | filled | written          | filled      ...

Memory: two buffers of `BUFFER_BYTES`.

The drawbacks: the file is not in the page cache for its next reader, and memory address, offset and length
must be multiples of `PAGE_BYTES`. Buffers are whole pages, so only the end of the file is written the
ordinary way. Everything is, without a thread, which would take a core from the arithmetic, once the system or
the filesystem refuses O_DIRECT. (tmpfs accepts it but copies; that cannot be detected.)
"""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from qlora_train.weights.disk_file import PAGE_BYTES

BUFFER_BYTES = 8 * 2**20


class DiskWriter:
    """A new file that is written sequentially. A context manager; use its `write` inside.

    Errors of the disk are raised by the next `write`, or on exit. The caller syncs the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = FileIO(path, "w")
        self._direct = _open_direct(path)
        self._buffers = [memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(2)]  # page-aligned
        self._current, self._num_filled = 0, 0
        self._num_queued = 0
        self._refuses_direct = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="disk-writer")
        self._pending: Future[None] | None = None

    def __enter__(self) -> DiskWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self._queue()
                self._wait()
        finally:
            try:
                self._thread.shutdown()
            finally:
                self._file.close()
                self._close_direct()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. They are copied, so `data` may be changed afterwards."""
        rest = memoryview(data)
        while rest:
            part = rest[: BUFFER_BYTES - self._num_filled]
            self._buffers[self._current][self._num_filled : self._num_filled + len(part)] = part
            self._num_filled += len(part)
            rest = rest[len(part) :]
            if self._num_filled == BUFFER_BYTES:
                self._queue()

    def _queue(self) -> None:
        """Write the filled part of the buffer in the thread, and switch to the other buffer."""
        self._wait()
        if self._refuses_direct:
            self._close_direct()
        filled = self._buffers[self._current][: self._num_filled]
        if self._direct is None:
            self._put(filled, self._num_queued)
        else:
            self._pending = self._thread.submit(self._put, filled, self._num_queued)
        self._num_queued += self._num_filled
        self._current, self._num_filled = 1 - self._current, 0

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _close_direct(self) -> None:
        if self._direct is not None:
            self._direct.close()
            self._direct = None

    def _put(self, memory: memoryview, offset_bytes: int) -> None:
        num_done = 0
        if self._direct is not None:
            whole_pages = memory[: len(memory) // PAGE_BYTES * PAGE_BYTES]
            num_done = _put_directly(self._direct, whole_pages, offset_bytes)
            self._refuses_direct = num_done < len(whole_pages)
        while num_done < len(memory):
            num_done += os.pwrite(self._file.fileno(), memory[num_done:], offset_bytes + num_done)


def _put_directly(file: FileIO, memory: memoryview, offset_bytes: int) -> int:
    """Write whole pages with O_DIRECT; returns the bytes written, fewer where the filesystem refuses it."""
    num_done = 0
    while num_done < len(memory) and num_done % PAGE_BYTES == 0:
        try:
            num_done += os.pwrite(file.fileno(), memory[num_done:], offset_bytes + num_done)
        except OSError as error:
            if error.errno not in (
                errno.EINVAL,
                errno.EOPNOTSUPP,
            ):  # some accept the flag and refuse to write
                raise
            break
    return num_done


def _open_direct(path: Path) -> FileIO | None:
    """The file opened with O_DIRECT; None where the system or the filesystem has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return FileIO(path, "r+", opener=lambda name, flags: os.open(name, os.O_WRONLY | os.O_DIRECT))
    except OSError:  # some filesystems allow no second open for writing
        return None
