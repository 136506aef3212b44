"""One piece of work in its own fresh process: no warm caches, no memory and no imports of the one before.

    python -m MODULE arguments.json figures.json

The module reads its arguments as JSON and writes its figures as JSON (`answer`). What it prints goes to a log
whose last lines become the error where it fails, is killed or takes too long; of one that takes too long they
say where each of its threads was. Peak memory is read inside the
child, from the kernel (and on CUDA from the allocator): the parent would see it only by polling. What the
parent does see is how much of the processor others took meanwhile: a time measured beside them is no time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

NUM_LAST_LINES, NUM_ERROR_LINES = 40, 8
GRACE_SECONDS = 2.0
"""For a process that took too long to say where it was, and for killed ones to be gone."""
PLAINLY = (sys.executable, "-u", "-m")
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
_CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """figures: what the piece measured, or None; error: its last lines then. seconds: of the whole process,
    start and imports included. others_num_cores: cores that other processes, or other guests of the host,
    kept busy meanwhile, on average. printed: its last lines."""

    figures: dict[str, Any] | None
    error: str | None
    seconds: float
    others_num_cores: float
    printed: str = ""


def run_piece(
    module: str,
    arguments: Mapping[str, Any],
    *,
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str] = PLAINLY,
) -> Outcome:
    """Run a module, such as `benchmarks.pieces.ours`, in a fresh process.

    arguments: plain JSON values. environment: added to this process's. launcher: the command that the
    module's name is put behind. Never raises for what the child does.
    """
    with tempfile.TemporaryDirectory(prefix="qlora-bench-") as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
        files = [str(folder / "arguments.json"), str(folder / "figures.json")]
        command = [*launcher, module, *files]
        started, busy_before = time.monotonic(), _others_busy_seconds()
        with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
            code = _run(command, log, timeout_seconds, _environment(environment or {}))
            seconds = time.monotonic() - started
            others = max(0.0, _others_busy_seconds() - busy_before) / seconds
            log.seek(0)
            last_lines = "\n".join(log.read().strip().splitlines()[-NUM_LAST_LINES:])
        file = folder / "figures.json"
        if code == 0 and file.is_file():
            figures = json.loads(file.read_text(encoding="utf-8"))
            return Outcome(figures, None, seconds, others, last_lines)
    error = f"{_ending(code, timeout_seconds)}\n{last_lines}".strip()
    return Outcome(None, error, seconds, others, last_lines)


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The main program of a piece: arguments in, figures out, with the peaks of this process beside them
    (those that `measure` took itself, at an earlier moment, stand)."""
    faulthandler.register(signal.SIGUSR1)
    arguments_file, figures_file = map(Path, sys.argv[1:])
    figures = measure(json.loads(arguments_file.read_text(encoding="utf-8")))
    text = json.dumps(peaks() | figures, allow_nan=False)
    figures_file.write_text(text, encoding="utf-8")


def peaks() -> dict[str, int]:
    """process_peak_bytes: resident memory at its highest since the process began. Where an accelerator is in
    use also device_peak_bytes and device_reserved_peak_bytes: the allocator's, since it was last reset."""
    from qlora_train.device.process_peak import process_peak_bytes

    found = {"process_peak_bytes": process_peak_bytes()}
    if "torch" not in sys.modules:
        return found
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and (module := torch.get_device_module(accelerator)).is_initialized():
        found["device_peak_bytes"] = module.max_memory_allocated()
        found["device_reserved_peak_bytes"] = module.max_memory_reserved()
    return found


def error_lines() -> str:
    """The end of the traceback of the exception that is being handled."""
    return "\n".join(traceback.format_exc().strip().splitlines()[-NUM_ERROR_LINES:])


def _others_busy_seconds() -> float:
    """Processor seconds so far of everybody but this process and the children it has waited for."""
    times = psutil.cpu_times()
    busy = sum(getattr(times, kind, 0.0) for kind in _BUSY)  # not every system tells all kinds apart
    ours = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in ours)


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    """This process's, this very package importable from anywhere, nothing downloaded."""
    paths = [str(_CHECKOUT), str(_CHECKOUT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths), **added}


def _run(command: list[str], log: Any, timeout_seconds: float, environment: Mapping[str, str]) -> int | None:
    """The exit code; None where the time was over. The child leads its own group, which ends with it."""
    child = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        return child.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGUSR1)  # see `answer`
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
        return None
    finally:
        _end(child)


def _end(child: subprocess.Popen[Any]) -> None:
    """With all that it started: its group, and pieces of its own, which lead other groups."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(child.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):  # it has ended, and all that it started
        os.killpg(child.pid, signal.SIGKILL)
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()
    psutil.wait_procs(started, GRACE_SECONDS)  # what comes next is measured without them


def _ending(code: int | None, timeout_seconds: float) -> str:
    if code is None:
        return f"not finished after {timeout_seconds:g} s"
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"exit code {code}" if code else "ended without figures"
