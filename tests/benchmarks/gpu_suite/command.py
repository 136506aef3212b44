"""Takes the stages of the GPU suite, each in a process of its own, and keeps records.

    make gpu-suite                                     everything, then the report
    make gpu-suite OUT=found STOP_AFTER=580            into one folder, within a limit; once more to go on
    make gpu-suite ONLY="smoke tests memory-8b"        by name, or by what names begin with
    make gpu-suite AGAIN=1                             also what has passed
    make gpu-suite DRY=1                               tiny shapes on the simulated GPU, to try the suite

Into the folder goes all that is worth keeping, few and small files: `gpu-suite.jsonl`, a line for every stage
that was taken, however it ended; `report.txt`, the newest line of each as tables; traces (traces.py). Inputs,
up to 60 GB, lie elsewhere, in shared memory where there is room, and are removed at the end.

A stage that has a record of having passed is not taken again, whatever has changed since: the record says on
which commit, so does the report. What failed, was cut short by the end of the call, or could not be begun in
the time left comes again with the next call, if the folder is the same or `gpu-suite.jsonl` is put into it.

Exit code 0: everything that was asked for has passed, or is skipped for want of a package; 1: not so; 2:
wrong usage, or no GPU. Imports no torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks import record
from benchmarks.gpu_suite.report import FAILED, PASSED, SKIPPED, newest, report_of
from benchmarks.gpu_suite.stages import DRY, REAL, REPOSITORY, Stage, files_of_tests, stages_of
from benchmarks.machine import describe_machine
from benchmarks.process import PLAINLY, Outcome, run_piece

SUITE = "gpu-suite"
CUT = "cut short"
SECONDS_TO_FINISH = 5.0
"""Left over for the report."""
SHARED_MEMORY = Path("/dev/shm")
WORK = "qlora-train-gpu-suite"
WORK_BYTES, SPARE_BYTES = 45 * 10**9, 12 * 10**9
"""The largest base, which may have to be pinned once more."""
SIMULATED = (*PLAINLY, "simulated_gpu")
TAKES_NO_GPU = 2


@dataclass
class Suite:
    """out: the folder of records and traces. work: of inputs. seconds_left: of this call. launcher: of stages
    that know the simulated GPU. take: runs a piece."""

    out: Path
    work: Path
    machine: Mapping[str, Any]
    log: Callable[[str], None]
    seconds_left: Callable[[], float] = lambda: float("inf")
    launcher: Sequence[str] = PLAINLY
    take: Callable[..., Outcome] = run_piece

    def run(self, stages: Sequence[Stage], *, again: bool = False) -> None:
        """Take those that have not passed. again: also those that have."""
        for stage in stages:
            before = newest(self.records(), stage.name)
            if before is not None and before["outcome"] == PASSED and not again:
                self.log(f"{stage.name}: passed {before['date']}; AGAIN=1 takes it again")
                continue
            absent = [name for name in stage.requires if importlib.util.find_spec(name) is None]
            absent += [name for name in stage.commands if shutil.which(name) is None]
            left = self.seconds_left() - SECONDS_TO_FINISH
            if absent:
                self._keep(stage, SKIPPED, error=f"not installed: {', '.join(absent)}")
            elif left < stage.least_seconds:
                self.log(f"{stage.name}: not begun with {left:.0f} s left")
            else:
                self._take(stage, min(left, stage.timeout_seconds))

    def records(self) -> list[dict[str, Any]]:
        return record.read(self.out, SUITE)

    def _take(self, stage: Stage, limit_seconds: float) -> None:
        self.log(f"{stage.name} ...")
        launcher = self.launcher if stage.knows_simulated else PLAINLY
        places = {"work": str(self.work), "out": str(self.out), "launcher": list(launcher)}
        scratch = self.work / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        outcome = self.take(
            stage.module,
            {**stage.arguments, **places},
            timeout_seconds=limit_seconds,
            environment={"QLORA_TRAIN_CACHE": str(self.work / "quantized"), "TMPDIR": str(scratch)},
            launcher=launcher,
        )
        if outcome.figures is not None:
            word = FAILED if outcome.figures["problems"] else PASSED
        else:
            has_time = limit_seconds >= stage.timeout_seconds
            word = FAILED if has_time or not str(outcome.error).startswith("not finished") else CUT
        self._keep(stage, word, outcome.seconds, outcome.figures, outcome.error, outcome.printed)

    def _keep(
        self,
        stage: Stage,
        word: str,
        seconds: float = 0.0,
        figures: Mapping[str, Any] | None = None,
        error: str | None = None,
        printed: str = "",
    ) -> None:
        self.log(f"{stage.name}: {word} after {seconds:.0f} s")
        for line in [error] if error else (figures or {}).get("problems", []):
            self.log(f"  {line}")
        record.append(
            self.out,
            SUITE,
            {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "stage": stage.name,
                "outcome": word,
                "seconds": seconds,
                "figures": figures,
                "error": error,
                "printed": "" if error else printed,
                "arguments": dict(stage.arguments),
                "machine": dict(self.machine),
            },
        )


def chosen(stages: Sequence[Stage], only: Sequence[str]) -> tuple[Stage, ...]:
    """By name or by what names begin with; all where nothing is named. Raises `ValueError` for a word that
    fits none."""
    for word in only:
        if not any(stage.name.startswith(word) for stage in stages):
            raise ValueError(f"{word}: no such stage; there are {', '.join(stage.name for stage in stages)}")
    return tuple(s for s in stages if not only or any(s.name.startswith(word) for word in only))


def folder_of_work(shared: Path = SHARED_MEMORY) -> Path:
    """Shared memory where it has room for the largest base and RAM has room for a pinned copy."""
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > WORK_BYTES
    in_memory = has_room and psutil.virtual_memory().available > 2 * WORK_BYTES + SPARE_BYTES
    return (shared if in_memory else REPOSITORY / "build") / WORK


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    args = _parser().parse_args(arguments)
    ends = time.monotonic() + (args.stop_after or float("inf"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # inputs are removed
    machine = describe_machine()
    machine |= {"commit": machine["commit"] or args.commit or None}
    if machine["gpu"] is None and not args.dry:
        print("no CUDA device is here (nvidia-smi finds none); DRY=1 tries the suite itself")
        return TAKES_NO_GPU
    tests = files_of_tests()
    try:
        stages = chosen(stages_of(DRY, tests[:1]) if args.dry else stages_of(REAL, tests), args.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return TAKES_NO_GPU
    if args.dry:
        paths = [str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    work = args.work / WORK if args.work else folder_of_work()
    shutil.rmtree(work, ignore_errors=True)  # of a call that was killed
    launcher = SIMULATED if args.dry else PLAINLY
    suite = Suite(args.out, work, machine, _log, lambda: ends - time.monotonic(), launcher)
    try:
        suite.run(stages, again=args.again)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text, is_good = report_of(stages, suite.records(), machine)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.txt").write_text(text, encoding="utf-8")
    print(text)
    return 0 if is_good else 1


def _log(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-suite"), metavar="DIR")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for inputs (60 GB); removed at the end")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="what names begin with")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="end before a limit")
    parser.add_argument("--commit", help="where git is not there to say it")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the simulated GPU")
    return parser
