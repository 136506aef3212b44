"""Signals that end a command: SIGINT (Ctrl-C), SIGTERM and SIGHUP raise `Interrupted` at once.

They raise, as start-up spends seconds in libraries that check no flag. They are stored too, as an exception
in a destructor or under a bare `except:` is lost: then the command ends with the signal's exit code when it
is done, and training (train/signals.py) checks for it before its first step.

SIGHUP means a closed terminal or a lost connection: writing to it fails, so output is discarded from then on.
Where SIGHUP is ignored (nohup) it stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from qlora_train.errors import Interrupted

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None)


class SignalHandler:
    """Handles the signals that end a command while its block runs, in the main thread. received: number of
    the last one, or 0."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # of a notebook, say: only the main thread may handle signals
        for number in SIGNALS:
            if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self)
        return self

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == HANGUP:
            print_nowhere()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        """Give the signals back to their previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class RaisesInterrupted(SignalHandler):
    """Raises `Interrupted` on signals; a context manager around a command."""

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        super().__call__(number, frame)
        raise Interrupted(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self.received and not isinstance(error, Interrupted):
            raise Interrupted(self.received) from error


def print_nowhere() -> None:
    """Discard what is printed from now on to stdout and stderr, where they are a terminal."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream without a file, in tests
            if os.isatty(stream.fileno()):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def lost_signal() -> int:
    """The number of an earlier signal whose exception was lost; 0: none."""
    handlers = (signal.getsignal(number) for number in SIGNALS)
    return next((h.received for h in handlers if isinstance(h, RaisesInterrupted)), 0)
