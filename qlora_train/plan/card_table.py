"""What popular bases take on common cards, planned once (`make table`), so that `qlora-train recipes`
and `init` say at once what fits this machine. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_train.device.cards import CARDS
from qlora_train.plan.words import duration

FILE = Path(__file__).parent / "card_table.json"
ROW_TOKENS = 512
FREE_SHARE = 0.85
"""Share of a card's memory that must be free: with less than all of it the planner streams a little more."""
_GIB = 2**30


def planned_lines(vram_bytes: int, ram_bytes: int) -> list[str]:
    """Lines about every base: what it takes on the largest card of the table that is no larger than the one
    here, or on the smallest that it fits. vram_bytes: free on the card here, 0 without one. ram_bytes: that a
    run may use."""
    lines = [
        "",
        f"bases, planned, not measured (VRAM, RAM, time for 1,000 rows of {ROW_TOKENS} tokens)"
        + ("; * fits this machine:" if vram_bytes else ":"),
    ]
    for name, cells in json.loads(FILE.read_text(encoding="utf-8")).items():
        plans = {card: cell for card, cell in cells.items() if cell is not None}
        here = [
            card for card, cell in plans.items() if _is_here(card, vram_bytes, cell["ram_gib"], ram_bytes)
        ]
        card = here[-1] if here else next(iter(plans))
        cell = plans[card]
        lines.append(
            f"{'*' if here else ' '} {name:<42} {cell['vram_gib']:4.1f} GiB  {cell['ram_gib']:4.1f} GiB  "
            f"{duration(cell['seconds'])} ({card})"
        )
    return [*lines, "a recipe for one of them, or for another base: qlora-train init"]


def _is_here(card: str, vram_bytes: int, ram_gib: float, ram_bytes: int) -> bool:
    """Whether this machine has nearly the memory of a card, and the RAM of a plan for it."""
    return CARDS[card].memory_gib * FREE_SHARE * _GIB <= vram_bytes and ram_gib * _GIB <= ram_bytes


def rounded_seconds(seconds: float) -> float:
    """Two significant digits: a plan's time is an estimate."""
    return float(f"{seconds:.2g}")
