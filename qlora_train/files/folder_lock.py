"""Who is at work in a folder: a lock on the folder itself, which ends with the process that took it.

Process numbers do not tell: two containers that share a volume both run as process 1, and a number that is
gone from here may be alive there. `flock` on an open folder is kept by the kernel for as long as the folder
stays open, so whatever ends a process, SIGKILL included, ends its locks, and no file is left that would have
to be believed. It holds between processes and containers of one machine, and where the filesystem passes it
on (NFS 4 does not for folders), between machines.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import TracebackType

PARTIAL, OLD = ".partial-", ".old-"
"""In the names of folders that are being written, or were replaced (see atomic_folder.py)."""
_NO_LOCKS_HERE = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class FolderLock:
    """A lock that is held until `close`, or until the process ends. A context manager.

    is_certain: False on a filesystem without locks, where others may be at work all the same."""

    def __init__(self, folder: Path, descriptor: int, *, is_certain: bool) -> None:
        self.folder, self.is_certain = folder, is_certain
        self._descriptor: int | None = descriptor

    def close(self) -> None:
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
    """Lock a folder; None if somebody holds it already, or it is not there (any more).

    shared: beside other shared locks, as readers do; waits for who is writing. Raises `OSError` for what is
    no folder that can be read."""
    import fcntl  # not on Windows

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


def _is_at(folder: Path, descriptor: int) -> bool:
    """Whether the open folder is still the one of this name: its owner may have removed it before the lock
    was ours."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left half-written in `parent`: folders of names `<name>.partial-...` and
    `<name>.old-...` that nobody holds."""
    if not parent.is_dir():
        return
    for path in parent.iterdir():
        if PARTIAL in path.name or OLD in path.name:
            remove_if_free(path)


def remove_if_free(folder: Path) -> bool:
    """Remove a folder unless somebody is at work in it; returns whether it is gone. What cannot be removed,
    or on a filesystem without locks might be in use, stays."""
    try:
        lock = lock_folder(folder)
    except OSError:
        return False
    if lock is not None:
        with lock:
            if lock.is_certain:
                shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()
