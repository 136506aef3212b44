"""Replaces a small text file atomically: the old text is there or the new one, whole, after a power cut too:
the new text is on the disk before it gets the file's name."""

from __future__ import annotations

import os
from pathlib import Path


def partial_of(file: Path) -> Path:
    """The file that is written first and renamed, by the only writer; killed meanwhile, it leaves it."""
    return file.with_suffix(".partial")


def replace_text(file: Path, text: str, *, is_shared: bool = False) -> None:
    """Write `text` as a file's whole content. The folder must be there. is_shared: other processes may be
    writing the same file."""
    partial = file.with_suffix(f".partial-{os.getpid()}") if is_shared else partial_of(file)
    with partial.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(file)
    if os.name == "posix":  # Windows opens no folders
        sync_to_disk(file.parent)


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
