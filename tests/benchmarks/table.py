"""The one table a bench prints: medians of several runs, and how they compare with a named contender.

A ratio is value / the reference's value, whichever way is better: 2.3x tokens/s is fast, 0.6x peak is small.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """figure: its name in the figures, with the unit in it. form: the number as it is shown."""

    figure: str
    heading: str
    form: Callable[[float], str]


@dataclass(frozen=True)
class Row:
    """What one contender of one case gave. runs: figures of the runs that succeeded. word: why there are
    none or fewer (absent, failed). is_reference: ratios of this case are against this row. has_failed: a
    process of it ended without figures."""

    case: str
    contender: str
    runs: tuple[Mapping[str, Any], ...] = ()
    word: str = ""
    is_reference: bool = False
    has_failed: bool = False


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def share(value: float) -> str:
    return f"{value:.0%}"


def median_figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median of every figure that is a number in all runs."""
    if not runs:
        return {}
    names = [name for name in runs[0] if all(_is_number(run.get(name)) for run in runs)]
    return {name: statistics.median(run[name] for run in runs) for name in names}


def build_table(rows: Sequence[Row], columns: Sequence[Column], targets: Mapping[str, str]) -> Table:
    """rows: of one case beside each other. columns: those that nobody has a figure for are left out. targets:
    per case, what is aimed at, in words."""
    medians = [median_figures(row.runs) for row in rows]
    shown = [column for column in columns if any(column.figure in found for found in medians)]
    references = {row.case: found for row, found in zip(rows, medians, strict=True) if row.is_reference}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("case", "contender", "runs"):
        table.add_column(heading, no_wrap=heading != "contender")
    for column in shown:
        table.add_column(column.heading, justify="right")
    table.add_column("")
    for i, (row, found) in enumerate(zip(rows, medians, strict=True)):
        reference = references.get(row.case, {}) if not row.is_reference else {}
        cells = [_cell(column, found, reference) for column in shown]
        starts = i == 0 or rows[i - 1].case != row.case
        ends = i + 1 == len(rows) or rows[i + 1].case != row.case
        target = targets.get(row.case) if starts else None
        notes = [row.word, f"target: {target}" if target else ""]
        names = (row.case if starts else "", row.contender, str(len(row.runs)))
        table.add_row(*names, *cells, "; ".join(filter(None, notes)), end_section=ends)
    return table


def _cell(column: Column, found: Mapping[str, float], reference: Mapping[str, float]) -> str:
    if column.figure not in found:
        return ""
    text = column.form(found[column.figure])
    beside = reference.get(column.figure)
    return f"{text} ({found[column.figure] / beside:.2f}x)" if beside else text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
