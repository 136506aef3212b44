"""What popular bases take on common cards, planned once (`make table`), so that `qlora-train recipes`
and `init` say at once what fits this machine. Imports no torch."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from qlora_train.device.cards import CARDS
from qlora_train.plan.base_config import known_name
from qlora_train.plan.words import duration
from qlora_train.units import GIB

FILE = Path(__file__).parent / "card_table.json"
ROW_TOKENS = 512
FREE_SHARE = 0.85
"""Share of a card's memory that must be free: with less than all of it the planner streams a little more."""


def kept_table() -> dict[str, dict[str, Any]]:
    """Of every base its `num_parameters`, and for each of `cards` what the fastest plan takes (`vram_gib`,
    `ram_gib`, `seconds` for 1,000 rows), None where none fits. Small bases and small cards come first."""
    table: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return table


def planned_recipes() -> set[str]:
    """The names of the bundled recipes that the table is about."""
    return {known_name(base) for base in kept_table()}


def planned_lines(vram_bytes: int, ram_bytes: int) -> list[str]:
    """Lines about the recipe of every base, those first that fit this machine: what it takes on the largest
    card of the table that is no larger than the one here, or on the smallest that it fits. vram_bytes: free
    on the card here, 0 without one. ram_bytes: that a run may use."""
    table, width = kept_table(), max(map(len, planned_recipes()))
    lines = [f"planned, not measured: VRAM and RAM in GiB, time for 1,000 rows of {ROW_TOKENS} tokens"]
    rows = [
        (*_nearest_card(planned["cards"], vram_bytes, ram_bytes), base) for base, planned in table.items()
    ]
    for (fits, card), of_card in groupby(sorted(rows, key=_order), key=lambda row: row[:2]):
        memory = f"{CARDS[card].memory_gib} GB"
        lines += ["", f"{'* fits this machine, ' if fits else '  '}planned for an {card} ({memory}):"]
        for *_, base in of_card:
            cell = table[base]["cards"][card]
            figures = f"{cell['vram_gib']:4.1f} {cell['ram_gib']:4.1f} {duration(cell['seconds']):>6}"
            lines.append(f"{'*' if fits else ' '} {known_name(base):<{width}} {figures}  {base}")
    return lines


def _order(row: tuple[bool, str, str]) -> tuple[bool, int]:
    """What fits first, on the largest card first."""
    fits, card, _ = row
    return not fits, -CARDS[card].memory_gib


def _nearest_card(
    cards: dict[str, dict[str, float] | None], vram_bytes: int, ram_bytes: int
) -> tuple[bool, str]:
    """(whether a plan fits this machine, the card that it was made for)."""
    plans = {card: cell for card, cell in cards.items() if cell is not None}
    here = [card for card, cell in plans.items() if _is_here(card, vram_bytes, cell["ram_gib"], ram_bytes)]
    return bool(here), here[-1] if here else next(iter(plans))


def _is_here(card: str, vram_bytes: int, ram_gib: float, ram_bytes: int) -> bool:
    """Whether this machine has nearly the memory of a card, and the RAM of a plan for it."""
    return CARDS[card].memory_gib * FREE_SHARE * GIB <= vram_bytes and ram_gib * GIB <= ram_bytes


def rounded_seconds(seconds: float) -> float:
    """Two significant digits: a plan's time is an estimate."""
    return float(f"{seconds:.2g}")
