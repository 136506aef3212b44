"""Figures kept on disk: `<folder>/<suite>.jsonl`, one JSON object per (case, contender, run), only added to.

Each line says everything about itself (settings, machine, versions, commit, date), so lines of several
machines and years lie in one file and any tool reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_train.errors import UserError


def append(folder: Path, suite: str, record: Mapping[str, Any]) -> None:
    """Add one line; the folder is made if need be. Raises `ValueError` for numbers that are not finite."""
    line = json.dumps(record, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with _file(folder, suite).open("a", encoding="utf-8") as file:
        file.write(line)


def read(folder: Path, suite: str) -> list[dict[str, Any]]:
    """All records of a suite in the order they were made; none where there is no file. Raises `UserError`,
    with the line, for one that does not read."""
    file = _file(folder, suite)
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}:{number}: not a record ({error}); repair or remove the line") from error
    return records


def _file(folder: Path, suite: str) -> Path:
    return folder / f"{suite}.jsonl"
