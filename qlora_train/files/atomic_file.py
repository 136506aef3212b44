"""Replaces a small text file atomically: readers see the old text or the new one, whole."""

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
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
