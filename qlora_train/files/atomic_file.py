"""Replaces a small text file atomically: readers see the old text or the new one, whole."""

from __future__ import annotations

from pathlib import Path


def partial_of(file: Path) -> Path:
    """The file that is written first and renamed; a process killed meanwhile leaves it."""
    return file.with_suffix(".partial")


def replace_text(file: Path, text: str) -> None:
    """Write `text` as a file's whole content. The folder must be there."""
    partial = partial_of(file)
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
