"""The table of bases and cards: its cells are what the planner says now, and README.md shows it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from qlora_train.plan import request as request_module
from qlora_train.plan.card_table import FILE, planned_lines
from qlora_train.plan.request import FoundCard, free_here

REPOSITORY = Path(__file__).parent.parent.parent
GIB = 2**30
MAKER = runpy.run_path(str(REPOSITORY / ".ci" / "card_table.py"))
TABLE: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("base", "card"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "RTX 4050"),
        ("meta-llama/Llama-3.2-1B-Instruct", "RTX 4060"),
        ("google/gemma-3-1b-it", "RTX 4070"),
        ("meta-llama/Llama-3.1-8B-Instruct", "RTX 4090"),
    ],
)
def test_a_cell_made_anew_is_the_same(base: str, card: str) -> None:
    assert MAKER["planned_cell"](base, card) == TABLE[base][card], "run: make table"


def test_the_readme_shows_the_table_of_the_package() -> None:
    assert tuple(TABLE) == MAKER["BASES"] and {tuple(cells) for cells in TABLE.values()} == {
        MAKER["OF_CARDS"]
    }
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    begin, end = MAKER["BEGIN"], MAKER["END"]
    assert text.partition(begin)[2].partition(end)[0] == MAKER["markdown"](TABLE), "run: make table"


def test_a_larger_card_takes_what_a_smaller_one_takes_and_is_not_slower() -> None:
    for base, cells in TABLE.items():
        fits = [cell is not None for cell in cells.values()]
        assert fits == sorted(fits) and fits[-1], base
        seconds = [cell["seconds"] for cell in cells.values() if cell][:-1]  # an RTX 4090 is the fastest
        assert seconds == sorted(seconds, reverse=True), base


def test_what_fits_a_machine_is_marked_and_has_its_figures() -> None:
    line = next(line for line in planned_lines(23 * GIB, 28 * GIB) if "Llama-3.1-8B" in line)
    cell = TABLE["meta-llama/Llama-3.1-8B-Instruct"]["RTX 4090"]
    assert line.startswith("* ") and f"{cell['vram_gib']:.1f} GiB" in line and "(RTX 4090)" in line
    for nothing in (planned_lines(0, 28 * GIB), planned_lines(23 * GIB, GIB // 4)):
        assert not any(line.startswith("*") for line in nothing)
        assert any("(RTX 4050)" in line for line in nothing)


def test_what_is_free_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "find_card", lambda: FoundCard("NVIDIA L4", 20 * GIB, (8, 9)))
    assert free_here()[0] == 20 * GIB
    monkeypatch.setattr(request_module, "find_card", lambda: None)
    vram_bytes, ram_bytes = free_here()
    assert vram_bytes == 0 and ram_bytes > 0
