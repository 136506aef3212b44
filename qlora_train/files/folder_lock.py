"""Locks a folder for a process; the lock ends with the process.

Process numbers in a lock file would not do: two containers that share a volume may both run as process 1, and
a number unknown here may run there. The kernel keeps a `flock` on an open folder for as long as it stays
open, so any end of the process, SIGKILL included, ends its locks and leaves no stale file. It holds between
processes and containers of one machine, and between machines if the filesystem supports that (NFS 4 does not
for folders). A forked child closes its copies of the open folders, or it would hold the locks of a parent
that is killed for as long as it takes to notice.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from types import TracebackType

PARTIAL, OLD = ".partial-", ".old-"
"""Marks in the names of folders that are being written, or were replaced (see atomic_folder.py)."""
_NO_LOCKS_HERE = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


_held: set[FolderLock] = set()


class FolderLock:
    """A lock that is held until `close`, or until the process ends. A context manager.

    is_certain: False on Windows and on a filesystem without locks, where other processes may use the folder
    too."""

    def __init__(self, folder: Path, descriptor: int | None, *, is_certain: bool) -> None:
        self.folder, self.is_certain = folder, is_certain
        self._descriptor = descriptor
        _held.add(self)

    def close(self) -> None:
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lock_folder(folder: Path, *, shared: bool = False) -> FolderLock | None:
    """Lock a folder; None if another process has locked it, or it does not exist (any more).

    shared: together with other shared locks, for readers; waits for a writer. Raises `OSError` where it is no
    readable folder."""
    if sys.platform == "win32":
        return FolderLock(folder, None, is_certain=False) if folder.is_dir() else None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    is_certain = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            os.close(descriptor)
            raise
        is_certain = False
    if not _is_at(folder, descriptor):
        os.close(descriptor)
        return None
    return FolderLock(folder, descriptor, is_certain=is_certain)


def _close_all() -> None:
    for lock in list(_held):
        lock.close()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_close_all)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Whether the open folder still has this name: its owner may have removed it before it was locked."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_leftovers(parent: Path) -> None:
    """Remove folders `<name>.partial-...` and `<name>.old-...` in `parent` that no process has locked: killed
    processes left them."""
    if not parent.is_dir():
        return
    for path in parent.iterdir():
        if PARTIAL in path.name or OLD in path.name:
            remove_if_free(path)


def remove_if_free(folder: Path) -> bool:
    """Remove a folder unless a process has locked it; returns whether it is gone. It stays on a filesystem
    without locks, where it may be in use."""
    try:
        lock = lock_folder(folder)
    except OSError:
        return False
    if lock is not None:
        with lock:
            if lock.is_certain:
                shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()
