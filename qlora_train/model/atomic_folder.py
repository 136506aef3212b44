"""Writing a folder that is either complete or not there.

Files go into `<name>.partial-<pid>` beside the final place, are fsynced, and the folder is renamed. A
failure removes the partial folder; a power cut leaves one whose name says what it is. A folder that stood
there before is replaced as a whole, never file by file: new weights beside an old config would be neither.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into, which becomes `folder` when the block ends without an
    exception."""
    folder = folder.resolve()  # a link to a larger disk keeps being one
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _fsync(path)
        _replace(folder, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _fsync(folder.parent)


def _replace(folder: Path, by: Path) -> None:
    if not folder.exists():
        os.rename(by, folder)
        return
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    os.rename(folder, old)
    os.rename(by, folder)
    shutil.rmtree(old)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
