"""Writing a folder that is either complete or not there.

Files go into `<name>.partial-<random>` beside the final place, are fsynced, and the folder is renamed. A
failure removes the partial folder; a power cut leaves one whose name says what it is. While it is written it
is locked (folder_lock.py), so that whoever clears up leftovers knows this one is none. A folder that stood
there before is replaced as a whole, never file by file: new weights beside an old config would be neither.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_train.files.folder_lock import OLD, PARTIAL, FolderLock, lock_folder


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into, which becomes `folder` when the block ends without an
    exception."""
    folder = folder.resolve()  # a link to a larger disk keeps being one
    with locked_partial(folder) as lock:
        partial = lock.folder
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                _fsync(path)
            _replace(folder, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    _fsync(folder.parent)


def locked_partial(folder: Path) -> FolderLock:
    """A new, locked folder beside `folder`, whose name says that it is unfinished."""
    while True:
        partial = folder.with_name(f"{folder.name}{PARTIAL}{secrets.token_hex(4)}")
        partial.mkdir(parents=True)
        lock = lock_folder(partial)
        if lock is not None:  # else somebody cleared it up before the lock was on it
            return lock


def _replace(folder: Path, by: Path) -> None:
    if not folder.exists():
        os.rename(by, folder)
        return
    old = folder.with_name(f"{folder.name}{OLD}{secrets.token_hex(4)}")
    os.rename(folder, old)
    os.rename(by, folder)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
