"""Pieces for tests: modules that a bench runs in processes of their own, here small scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

HEAD = "from benchmarks.process import answer\n\n\ndef measure(arguments):\n"
TAIL = "\n\nif __name__ == '__main__':\n    answer(measure)\n"


@pytest.fixture
def make_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """make_piece(name, body of measure(arguments)) -> the module's name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name: str, body: str) -> str:
        (tmp_path / f"{name}.py").write_text(HEAD + "\n".join(f"    {x}" for x in body.split("\n")) + TAIL)
        return name

    return make
