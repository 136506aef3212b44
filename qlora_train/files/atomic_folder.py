"""Writes a folder atomically: it is either complete or not there.

Files are written into `<name>.partial-<random>` beside the final place and fsynced, then the folder is
renamed. A failure removes the partial folder; a power cut leaves it, recognisable by its name. It is locked
while it is written (folder_lock.py), so that removing leftovers spares it. An existing folder is replaced as
a whole, as new weights beside an old config would be wrong.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_train.files.atomic_file import sync_to_disk
from qlora_train.files.folder_lock import OLD, PARTIAL, FolderLock, lock_folder


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into, which becomes `folder` when the block ends without an
    exception."""
    folder = folder.resolve()  # a symbolic link stays one
    with locked_partial(folder) as lock:
        partial = lock.folder
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                sync_to_disk(path)
            _replace(folder, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    sync_to_disk(folder.parent)


def locked_partial(folder: Path) -> FolderLock:
    """Create and lock a folder beside `folder`, whose name marks it as partial."""
    while True:
        partial = folder.with_name(f"{folder.name}{PARTIAL}{secrets.token_hex(4)}")
        partial.mkdir(parents=True)
        lock = lock_folder(partial)
        if lock is not None:  # else another process removed it before it was locked
            return lock


def _replace(folder: Path, by: Path) -> None:
    if not folder.exists():
        os.rename(by, folder)
        return
    old = folder.with_name(f"{folder.name}{OLD}{secrets.token_hex(4)}")
    os.rename(folder, old)
    os.rename(by, folder)
    shutil.rmtree(old, ignore_errors=True)
