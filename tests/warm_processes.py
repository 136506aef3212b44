"""Processes that begin with everything imported, and whole commands in them.

They are forked from one that has imported what training needs and done nothing else, which a test process
starts once: so a process costs what it does, and not five seconds of imports before.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tiny_runs import child_environment

import qlora_train.train.run  # noqa: F401 (what a training run needs)
from qlora_train.cli import main

TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Ended:
    """How a command ended; said: what it wrote to stdout and stderr. By a signal: minus its number."""

    code: int
    said: str


@dataclass(frozen=True)
class SignalAfterStep:
    """A signal that the process gets once metrics.jsonl has the row of a step, wherever it is by then."""

    number: int
    metrics: Path
    step: int

    def wait_and_send(self) -> None:
        row, pause = f'{{"step": {self.step}, "loss"', threading.Event()
        while not (self.metrics.is_file() and row in self.metrics.read_text()):
            pause.wait(0.001)
        os.kill(os.getpid(), self.number)


@contextmanager
def warm_context() -> Iterator[ForkServerContext]:
    """Processes are to be started within the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_processes"])
    with _search_path_in_environment():
        yield context


@contextmanager
def _search_path_in_environment() -> Iterator[None]:
    """The process that forks is not told where its parent finds modules (Python 3.11)."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def run_command(
    arguments: list[str],
    log: Path,
    stop: SignalAfterStep | None = None,
    before: Callable[[], None] | None = None,
) -> Ended:
    """`qlora-train *arguments`. log: a file for what it writes. before: what the process does first, a
    function of a module or a `partial` of one."""
    return wait_for(start_command(arguments, log, stop, before=before), log)


def start_command(
    arguments: list[str],
    log: Path,
    stop: SignalAfterStep | None = None,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> BaseProcess:
    """As `run_command`, without waiting. environment: instead of this process's."""
    environment = environment or child_environment()
    with warm_context() as context:
        process = context.Process(
            target=_command,
            args=(arguments, log, stop, environment, torch.get_num_threads(), before),
        )
        process.start()
    return process


def wait_for(process: BaseProcess, log: Path) -> Ended:
    process.join(TIMEOUT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, log.read_text())


def run_in_ranks(
    arguments: list[str], folder: Path, num_ranks: int, own: Sequence[Sequence[str]] = ()
) -> Ended:
    """`qlora-train *arguments` in each rank of a launch on this machine's CPU, with the variables that a
    launcher sets. The first code that is not 0; what all have written, in the order of ranks.
    own: more arguments of each rank."""
    environment = child_environment(
        GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()),
        WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks),
    )  # fmt: skip
    if not torch.accelerator.is_available():
        environment.pop("ACCELERATE_USE_CPU", None)  # ranks find each other without it
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    processes = [
        start_command(
            [*arguments, *(own[rank] if own else ())],
            log,
            None,
            environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    ended = [wait_for(process, log) for process, log in zip(processes, logs, strict=True)]
    return Ended(next((e.code for e in ended if e.code), 0), "".join(e.said for e in ended))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _command(
    arguments: list[str],
    log: Path,
    stop: SignalAfterStep | None,
    environment: dict[str, str],
    num_threads: int,
    before: Callable[[], None] | None,
) -> None:
    """In the process itself, which has the environment and the files of the one it was forked from."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(num_threads)
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if stop is not None:
        threading.Thread(target=stop.wait_and_send, daemon=True).start()
    if before is not None:
        before()
    sys.exit(main(arguments))
