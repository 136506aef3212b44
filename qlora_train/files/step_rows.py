"""Reads the files of a run that grow by a JSON object a line, each with its `step`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def step_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, without damaged lines, which a run that was killed may leave; empty: there is
    none."""
    if not file.is_file():
        return []
    rows = (_row_of(line) for line in file.read_bytes().splitlines())
    return [row for row in rows if row is not None]


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None: the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
