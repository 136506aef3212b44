"""Shows the progress of a run: a live bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

GIB = 2**30


class TrainProgress:
    """Progress output; a context manager around the steps of a run. quiet: print nothing (other ranks)."""

    def __init__(self, num_steps: int, first_step: int, log_every: int, *, quiet: bool) -> None:
        self._console = Console(quiet=quiet, highlight=False)
        self._log_every = log_every
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=first_step, status="")
        self._num_steps = num_steps

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def log(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    def step(
        self, step: int, loss: float, tokens_per_second: float, peak_bytes: int, seconds_left: float
    ) -> None:
        """Show the values of an optimizer step."""
        status = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  peak {peak_bytes / GIB:.2f} GiB"
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal and (step % self._log_every == 0 or step == self._num_steps):
            self.log(f"step {step}/{self._num_steps}  {status}  ETA {_clock(seconds_left)}")


def _clock(seconds: float) -> str:
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
