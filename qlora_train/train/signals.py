"""Ctrl-C, SIGTERM and SIGHUP end a run after the step in hand, with the state saved. A second one ends it at
once.

The first says so immediately, written to stderr by the handler itself: a step can take minutes, and silence
looks as if the key had not been heard. SIGHUP is a closed terminal or a lost connection: nobody reads what is
printed from then on, and writing to it fails, so output goes nowhere. Where it is ignored (nohup) it stays
ignored.
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
    """A context manager; `received` is the number of the first signal, or 0: one that went missing during
    start-up counts. announce: the line that is written when it comes."""

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
        self._restore()  # the next one does what it did before us
        if number == HANGUP:
            print_nowhere()
        else:
            with contextlib.suppress(OSError):  # its reader may be gone, too
                os.write(2, f"\n{self._announce()}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
