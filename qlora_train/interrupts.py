"""Signals that end a command: SIGINT (Ctrl-C) and SIGTERM raise `Interrupted` wherever the program is.

Raised, not only noted: start-up spends its seconds in libraries that ask nobody. And noted, not only raised:
an exception inside a destructor, or under a bare `except:`, is lost. So a signal whose exception went missing
still ends the command where it would have ended, and training (train/signals.py) asks before its first step.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, NoReturn

from qlora_train.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RaisesInterrupted:
    """A context manager around a command, in the main thread."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> RaisesInterrupted:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self)
        return self

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        """The handler."""
        self.received = number
        raise Interrupted(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.received and not isinstance(error, Interrupted):
            raise Interrupted(self.received) from error


def lost_signal() -> int:
    """The number of a signal that came earlier and whose exception went missing; 0: none."""
    handlers = (signal.getsignal(number) for number in SIGNALS)
    return next((h.received for h in handlers if isinstance(h, RaisesInterrupted)), 0)
