"""A function, applied to items by forked processes, results in order.

A fork has everything its parent has, so the function and what it knows are not sent; items and results are.
Forks are safe here because they compute with Python, numpy and the tokenizer only: they never touch a GPU or
torch's threads. They may be lost (see `expendable`), and end with their parent.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any

from qlora_train.data.expendable import begin_expendable, forks_without_threads, is_too_slow, too_slow
from qlora_train.errors import OutOfMemory

_MAX_WORKERS = 16
_AHEAD = 2  # items on their way, for each worker
_function: Callable[[Any], Any] | None = None


def num_processors() -> int:
    """How many processes are worth starting; 0 where processes cannot be forked."""
    if sys.platform != "linux":
        return 0
    return min(len(os.sched_getaffinity(0)), _MAX_WORKERS)


def in_processes(function: Callable[[Any], Any], items: Iterable[Any], number: int) -> Iterator[Any]:
    """The results function(item) of all items, in order, from so many forked processes. Raises what it
    raises; OutOfMemory where a process is killed."""
    global _function
    _function = function
    context = multiprocessing.get_context("fork")
    workers: list[BaseProcess] = []
    under_way: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=begin_expendable)
    try:
        with forks_without_threads():
            pool.submit(os.getpid).result()  # all start with the first
        workers = multiprocessing.active_children()
        for item in items:
            under_way.append(pool.submit(_apply, item))
            if len(under_way) > _AHEAD * number:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        pool.shutdown()
        if any(is_too_slow(worker.exitcode) for worker in workers):
            raise too_slow() from error
        raise OutOfMemory(
            "a process that tokenises was killed, most likely because memory ran out. Close other "
            "programs, or run with fewer processors (taskset -c 0)."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _apply(item: Any) -> Any:
    assert _function is not None, "set before the fork"
    return _function(item)
