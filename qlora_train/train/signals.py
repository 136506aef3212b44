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
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """A context manager; `received` is the number of the first signal, or 0. announce: the line that is
    written when it comes."""

    def __init__(self, announce: Callable[[], str] = lambda: "stopping after this step") -> None:
        self.received = 0
        self._announce = announce
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()  # the next one does what it did before us
        if number == signal.SIGHUP:
            _print_nowhere()
        else:
            with contextlib.suppress(OSError):  # its reader may be gone, too
                os.write(2, f"\n{self._announce()}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _print_nowhere() -> None:
    """From now on, for stdout and stderr where they are a terminal."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream without a file, in tests
            if os.isatty(stream.fileno()):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
