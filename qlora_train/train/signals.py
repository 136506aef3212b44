"""SIGINT (Ctrl-C), SIGTERM and SIGHUP end training after the current step, with the state saved; a second one
ends it at once.

A step can take minutes, so the handler itself acknowledges the first signal on stderr. SIGHUP is handled as
in interrupts.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from types import FrameType
from typing import Self

from qlora_train.interrupts import HANGUP, SignalHandler, lost_signal


class StopSignal(SignalHandler):
    """A context manager that notes signals. received: number of the first signal, or 0; one whose exception
    was lost during start-up counts. announce: returns the line to print when it comes."""

    def __init__(self, announce: Callable[[], str] = lambda: "stopping after this step") -> None:
        super().__init__()
        self._announce = announce

    def __enter__(self) -> Self:
        self.received = lost_signal()
        return super().__enter__()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._restore()  # the next signal has the previous handler
        super().__call__(number, frame)
        if number != HANGUP:
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, f"\n{self._announce()}\n".encode())
