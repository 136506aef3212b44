"""Formats sizes, times and messages of plans as text. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_train.errors import UserError
from qlora_train.units import GIB


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def parameter_count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.1f}M"


def duration(seconds: float) -> str:
    """A time in s, min or h."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def largest_in_words(parts: Mapping[str, int], number: int) -> str:
    """The `number` largest causes and their GiB, as text."""
    causes = sorted(parts.items(), key=lambda item: -item[1])[:number]
    return ", ".join(f"{cause} {gib(num_bytes)}" for cause, num_bytes in causes)


def positions_line(sequence_length: int, max_positions: int) -> list[str]:
    """A warning where documents may be longer than the model's positions; else nothing."""
    if sequence_length <= max_positions:
        return []
    return [
        f"data.sequence_length {sequence_length:,} is beyond the {max_positions:,} positions that "
        "config.json states: rotary positions go on, but the base has not seen longer documents"
    ]


def refusal(
    problems: Sequence[str],
    floor: Mapping[str, int],
    advice: Sequence[str],
    otherwise: str = "no single change of the recipe would do; take a smaller base or a larger budget",
) -> UserError:
    """The error of a plan that does not fit. floor: bytes of the smallest plan by cause. advice: changes each
    of which would fit. otherwise: what to do where there is none."""
    lines = ["this does not fit, however it is arranged:"]
    lines += [f"  {problem}" for problem in problems]
    lines.append(f"  the floor is made of {largest_in_words(floor, 5)}")
    if advice:
        lines += ["what would fit, one at a time:", *(f"  {change}" for change in advice)]
    else:
        lines.append(otherwise)
    return UserError("\n".join(lines))
