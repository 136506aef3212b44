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
from contextlib import contextmanager
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


def in_processes(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The results function(item) of all items, in order, from forked processes. Raises what it raises;
    OutOfMemory where a process is killed."""
    global _function
    _function = function
    number = num_processors()
    context = multiprocessing.get_context("fork")
    under_way: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_begin)
    try:
        with _forks_without_threads():
            pool.submit(os.getpid).result()  # all start with the first
        for item in items:
            under_way.append(pool.submit(_apply, item))
            if len(under_way) > _AHEAD * number:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise OutOfMemory(
            "a process that tokenises was killed, most likely because memory ran out. Close other "
            "programs, or run with fewer processors (taskset -c 0)."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _forks_without_threads() -> Iterator[None]:
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
