"""Ctrl-C and SIGTERM end a run after the step in hand, with the state saved. A second one ends it at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from qlora_train.interrupts import SIGNALS, lost_signal


class StopSignal:
    """A context manager; `received` is the number of the first signal, or 0: one that went missing during
    start-up counts."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self.received = lost_signal()
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()  # the next one does what it did before us

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
