"""Writes rows that are in memory to a file that a recipe can name: `data.train: rows.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_train.errors import DataError
from qlora_train.files.atomic_file import partial_of


def save_rows(rows: Iterable[Mapping[str, Any]], file: Path | str) -> str:
    """Write rows (a list of objects, or a `datasets.Dataset`) as JSON lines; returns the file's path.

    A run reads its data again when it is resumed, so they have to be a file. An earlier file of this name is
    replaced when all rows are written. Raises `DataError` for a row that is no object or holds what JSON has
    no form for, with its number and column, and where there is no row."""
    target = Path(file)
    if target.suffix != ".jsonl":
        raise DataError(f"{target}: is to hold JSON lines; name it .jsonl")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(target)
    number = 0
    try:
        with partial.open("w", encoding="utf-8") as lines:
            for number, row in enumerate(rows, 1):
                lines.write(_line(row, number) + "\n")
        if not number:
            raise DataError(f"{target}: there are no rows to write")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return str(target)


def _line(row: Mapping[str, Any], number: int) -> str:
    if not isinstance(row, Mapping):
        raise DataError(f"row {number} is a {type(row).__name__}, no object of columns")
    for column, value in row.items():
        try:
            json.dumps({column: value}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"row {number}, column {column!r}: has no form in JSON ({error})") from error
    return json.dumps(dict(row), ensure_ascii=False)
