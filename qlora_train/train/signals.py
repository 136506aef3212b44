"""SIGINT (Ctrl-C), SIGTERM and SIGHUP end training after the current step, with the state saved; a second one
ends it at once.

A step can take minutes, so the handler itself acknowledges the first signal on stderr. SIGHUP is handled as
in interrupts.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from qlora_train.interrupts import HANGUP, handled_signals, lost_signal, print_nowhere


class StopSignal:
    """A context manager that notes signals. received: number of the first signal, or 0; one whose exception
    was lost during start-up counts. announce: returns the line to print when it comes."""

    def __init__(self, announce: Callable[[], str] = lambda: "stopping after this step") -> None:
        self.received = 0
        self._announce = announce
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self.received = lost_signal()
        for number in handled_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()  # the next signal has the previous handler
        if number == HANGUP:
            print_nowhere()
        else:
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, f"\n{self._announce()}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
