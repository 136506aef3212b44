"""Shows the progress of a run: a live bar and the newest values on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from statistics import median
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from qlora_train.plan.words import gib
from qlora_train.terminal_text import message

STEPS_LOOKED_AT = 100
"""The newest steps, of whose seconds the median counts."""


class TrainProgress:
    """Progress output; a context manager around the steps of a run."""

    def __init__(
        self, num_steps: int, first_step: int, log_every: int, *, slow_steps: int, quiet: bool, peak_name: str
    ) -> None:
        """slow_steps: first steps to leave out of the time left, as they are metered. quiet: print nothing
        (other ranks). peak_name: what the bytes of `step` are the peak of."""
        self._console = Console(quiet=quiet, highlight=False)
        self._num_steps, self._log_every, self._peak_name = num_steps, log_every, peak_name
        self._is_live = self._console.is_terminal or _shows_widgets(self._console)
        self._bar = _BarAndValues(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[time_left]}"),
            console=self._console,
            disable=quiet or not self._is_live,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=first_step, time_left="")
        self._time_left = TimeLeft(slow_steps)

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def log(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(message(line), markup=False, soft_wrap=True)

    def show(self, values: str) -> None:
        """Show these values under the bar, up to the next step."""
        self._bar.values = values

    def step(self, row: Mapping[str, float | int | bool], epoch: float, seconds: float) -> None:
        """Show the values of an optimizer step. row: the step's row of metrics.jsonl. epoch: the epochs of
        the data at its end. seconds: the time that it took."""
        step = int(row["step"])
        values = (
            f"loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  grad norm {row['grad_norm']:.3g}  "
            f"epoch {epoch:.2f}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{self._peak_name} {gib(row['peak_bytes'])}"
        )
        seconds_left = self._time_left.after(seconds, self._num_steps - step)
        time_left = "" if seconds_left is None else f"ETA {_clock(seconds_left)}"
        self.show(values)
        self._bar.update(self._task, completed=step, time_left=time_left)
        if not self._is_live and (step % self._log_every == 0 or step == self._num_steps):
            self.log("  ".join(filter(None, (f"step {step}/{self._num_steps}", values, time_left))))


class _BarAndValues(Progress):
    """A bar with a line of values under it, which is as wide as the terminal."""

    values = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.values:
            yield Text(self.values)


class TimeLeft:
    """Seconds to the end of a run: a median step for each that is left, and its share of what happens between
    steps (evaluations, checkpoints)."""

    def __init__(self, num_left_out: int) -> None:
        """num_left_out: first steps to ignore."""
        self._num_left_out = num_left_out
        self._seconds: deque[float] = deque(maxlen=STEPS_LOOKED_AT)
        self._began: float | None = None
        self._in_steps, self._num_steps = 0.0, 0

    def after(self, seconds: float, num_left: int) -> float | None:
        """The seconds left after another step, which took `seconds`; None as long as they are not known."""
        if self._num_left_out > 0:
            self._num_left_out -= 1
            return None
        if self._began is None:
            self._began = time.monotonic() - seconds
        self._seconds.append(seconds)
        self._in_steps += seconds
        self._num_steps += 1
        between = max(0.0, time.monotonic() - self._began - self._in_steps) / self._num_steps
        return num_left * (median(self._seconds) + between)


def _shows_widgets(console: Console) -> bool:
    """Whether this is a notebook that can show a bar that changes: lines are printed in one that cannot."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
