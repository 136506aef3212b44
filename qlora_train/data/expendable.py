"""Runs what may never end, or take all memory, in a process that the system ends.

A chat template is a program that came with a checkpoint. The sandbox keeps it from files and the network, not
from looping for ever or doubling a text until memory is full, and inside one call into C no code of ours runs
that could stop it. So it is run in a process that may be lost: a child of this one that waits for calls, or
one of those that tokenise (`workers`).

    time     a timer of processor time, which ends the process (SIGPROF). A call has what the one before has
             left and `SECONDS_A_CALL`, at most `SECONDS_AT_ONCE`: a thousand calls are bounded too
    memory   on Linux only, the only system that holds a process to it: address space beyond what it has

Windows has neither: there functions run in this process, without limits.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess, SpawnProcess
from typing import Any, TypeVar

from qlora_train.errors import DataError, OutOfMemory

if sys.platform == "linux":
    import resource

Result = TypeVar("Result")
SECONDS_AT_ONCE = 10.0
SECONDS_A_CALL = 0.1
MAX_BYTES = 2**30
_child: _Child | None = None
_is_expendable = False
_seconds_left = SECONDS_AT_ONCE


def within_limits(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments) in an expendable process: this one if it is one, else a child. Raises DataError
    where a chat template, which is what runs there, exceeds the limits."""
    global _child
    if sys.platform == "win32" or _is_expendable:
        return _limited(function, *arguments)
    if _child is None:
        _child = _Child()
    try:
        return _child.call(function, arguments)
    except BaseException as error:
        if not isinstance(error, _Raised):  # the child has ended, or would answer this call at the next one
            _child.end()
            _child = None
            raise
        raise error.error from None


def too_slow() -> DataError:
    return DataError(
        f"The chat template is too slow: writing a text may take {SECONDS_AT_ONCE:.0f} s of processor time, "
        f"and {SECONDS_A_CALL} s on average. Set another one with model.chat_template."
    )


def is_too_slow(exit_code: int | None) -> bool:
    """Whether a process was ended by the timer."""
    return sys.platform != "win32" and exit_code == -signal.SIGPROF


def begin_expendable() -> None:
    """Makes this process, a child, one that may be lost, and that ends with its parent, even if it is
    killed."""
    global _is_expendable
    _is_expendable = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


@contextmanager
def forks_without_threads() -> Iterator[None]:
    """Tokenizers read at the fork that they are to start no threads; Python's warning of forks beside threads
    is not for these, which use none."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Raised(Exception):
    """What a function raised in the child."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Child:
    """A process that answers calls one by one."""

    def __init__(self) -> None:
        self._connection, other = multiprocessing.Pipe()
        process = ForkProcess if sys.platform == "linux" else SpawnProcess
        self._process = process(target=_serve, args=(other,), daemon=True)
        with forks_without_threads():
            self._process.start()
        other.close()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Raises `_Raised` for what the function raises."""
        try:
            self._connection.send((function, arguments))
            error, result = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            if is_too_slow(self._process.exitcode):
                raise too_slow() from error
            raise OutOfMemory(
                "the process that runs the chat template was killed, most likely because memory ran out."
            ) from error
        if error is not None:
            raise _Raised(error)
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection) -> None:
    begin_expendable()
    while True:
        function, arguments = connection.recv()
        answer: tuple[Exception | None, Any]
        try:
            answer = None, _limited(function, *arguments)
        except Exception as error:
            answer = error, None
        connection.send(answer)


def _limited(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments) with the limits, of which the one of time ends the process."""
    global _seconds_left
    if sys.platform == "win32":
        return function(*arguments)
    before = _limit_memory()
    signal.setitimer(signal.ITIMER_PROF, _seconds_left)
    try:
        return function(*arguments)
    except MemoryError:
        raise DataError(
            f"The chat template takes more than {MAX_BYTES / 2**30:.0f} GiB of memory to write a text. Set "
            "another one with model.chat_template."
        ) from None
    finally:
        left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
        _seconds_left = min(left + SECONDS_A_CALL, SECONDS_AT_ONCE)
        if before is not None:
            resource.setrlimit(resource.RLIMIT_AS, before)


def _limit_memory() -> tuple[int, int] | None:
    """Sets the limit, where there is one; returns the one before."""
    if sys.platform != "linux":
        return None
    soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
    most = int(os.pread(_memory_file(), 64, 0).split()[0]) * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(most, soft), hard))
    return before


@cache
def _memory_file() -> int:
    """The open file that tells how much address space this process has; only asked for in a child."""
    return os.open("/proc/self/statm", os.O_RDONLY)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
