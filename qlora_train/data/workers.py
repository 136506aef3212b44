"""A function, applied to items by forked processes, results in order.

A fork has everything its parent has, so the function and what it knows are not sent; items and results are.
Forks are safe here because they compute with Python, numpy and the tokenizer only: they never touch a GPU or
torch's threads. They end with their parent, even if it is killed: each watches it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from qlora_train.errors import OutOfMemory

_MAX_WORKERS = 16
_AHEAD = 2  # items on their way, for each worker
_function: Callable[[Any], Any] | None = None


def num_processors() -> int:
    """How many processes are worth starting; 1 where processes cannot be forked."""
    if sys.platform != "linux":
        return 1
    return min(len(os.sched_getaffinity(0)), _MAX_WORKERS)


class Workers:
    """A context manager; the processes are those of its scope."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __enter__(self) -> Workers:
        global _function
        _function = self._function
        self._number = num_processors()
        self._pool = ProcessPoolExecutor(
            self._number, mp_context=multiprocessing.get_context("fork"), initializer=_begin
        )
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read at the fork: no threads come along
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
                self._pool.submit(os.getpid).result()  # all start with the first
        finally:
            if before is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """function(item) for each, in order. Raises what it raises; OutOfMemory where a process is killed."""
        under_way: deque[Future[Any]] = deque()
        try:
            for item in items:
                under_way.append(self._pool.submit(_apply, item))
                if len(under_way) > _AHEAD * self._number:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise OutOfMemory(
                "a process that tokenises was killed, most likely because memory ran out. Close other "
                "programs, or run with fewer processors (taskset -c 0)."
            ) from error


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _apply(item: Any) -> Any:
    assert _function is not None, "set before the fork"
    return _function(item)
