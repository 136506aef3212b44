"""How far reading is: a bar on a terminal, now and then a line elsewhere; nothing for what is soon done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Told = Callable[[int, float], None]
"""Told (rows read so far, share of the bytes that hold them)."""
_QUIET_SECONDS, _LINE_SECONDS = 3.0, 30.0


@contextmanager
def reading_progress() -> Iterator[Told]:
    """On stderr, so that what a command prints stays what it is."""
    console = Console(file=sys.stderr, highlight=False)
    bar = Progress(
        TextColumn("reading data"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[num_rows]:,} rows, {task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("", total=1.0, num_rows=0, rate=0.0)
    began = said = time.monotonic()

    def told(num_rows: int, share: float) -> None:
        nonlocal said
        now = time.monotonic()
        rate = num_rows / max(now - began, 1e-9)
        if now - began < _QUIET_SECONDS:
            return
        if console.is_terminal:
            bar.start()  # once is enough
            bar.update(task, completed=share, num_rows=num_rows, rate=rate)
        elif now - said >= _LINE_SECONDS:
            said = now
            console.print(f"reading data: {num_rows:,} rows, {share:.0%}, {rate:,.0f} rows/s", soft_wrap=True)

    try:
        yield told
    finally:
        if bar.live.is_started:
            bar.stop()
