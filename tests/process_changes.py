"""What a process of tests/warm_processes.py does before its command: changes that end with it."""

from __future__ import annotations

import os
import resource
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_train.train import run


def hold_after_the_check(told: Path) -> None:
    """A run makes that file once it holds its folder, and then waits."""

    def wait(*_: Any, **__: Any) -> None:
        told.touch()
        threading.Event().wait()

    run.prepare = wait  # type: ignore[assignment]


def swallow_sigterm(catches: type[BaseException]) -> None:
    """SIGTERM comes while a run starts up, inside a library that catches these exceptions."""
    really = run.prepare

    def prepare(*arguments: Any, **options: Any) -> Any:
        with suppress(catches):
            os.kill(os.getpid(), signal.SIGTERM)
        return really(*arguments, **options)

    run.prepare = prepare


def limit_file_size(num_bytes: int) -> None:
    """Larger files are refused, as by a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
