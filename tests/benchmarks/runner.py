"""Runs cases: every run of every contender in its own process, one after another, interleaved.

The machine drifts (heat, neighbours, the page cache), so contenders take turns and every other round goes
backwards: a drift that is linear in time falls on all alike. Medians do the rest.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.case import Case, Contender
from benchmarks.process import Outcome, run_piece
from benchmarks.table import Row
from qlora_train.errors import QloraTrainError

INPUTS = "benchmarks.pieces.inputs"
INPUTS_TIMEOUT_SECONDS = 3600.0
DISTURBED_NUM_CORES = 0.2


@dataclass
class _Turns:
    """Of one contender: what it gave, and why it is not run (again)."""

    contender: Contender
    word: str
    runs: list[Mapping[str, Any]] = field(default_factory=list)
    has_failed: bool = False


@dataclass(frozen=True)
class Bench:
    """folder: where inputs are made and found again. records: the folder that figures are added to. machine:
    `describe_machine()`. say: told a line each about what goes on."""

    folder: Path
    records: Path
    machine: Mapping[str, Any]
    log: Callable[[str], None]

    def run(self, case: Case, num_runs: int) -> list[Row]:
        """The rows of one case. Raises `QloraTrainError` where its inputs cannot be made; what a contender
        does wrong becomes a record and a word."""
        turns = [_Turns(contender, self._why_not(case, contender)) for contender in case.contenders]
        if all(turn.word for turn in turns):
            return [_row(case, turn) for turn in turns]
        settings = {**case.settings, "inputs": self._inputs(case)}
        for number in range(num_runs):
            for turn in turns if number % 2 == 0 else reversed(turns):
                if not turn.word:
                    self._take(case, turn, settings, number)
        return [_row(case, turn) for turn in turns]

    def _why_not(self, case: Case, contender: Contender) -> str:
        """A word where a contender cannot run here."""
        if case.needs_cuda and self.machine["gpu"] is None:
            return "skipped: no CUDA device"
        absent = [name for name in contender.requires if importlib.util.find_spec(name) is None]
        absent += [name for name in contender.commands if shutil.which(name) is None]
        return f"skipped: {', '.join(absent)} not installed" if absent else ""

    def _inputs(self, case: Case) -> dict[str, str]:
        if not case.inputs:
            return {}
        arguments = {"folder": str(self.folder), **case.inputs}
        outcome = self._run_piece(INPUTS, arguments, INPUTS_TIMEOUT_SECONDS)
        if outcome.figures is None:
            raise QloraTrainError(f"{case.name}: its inputs could not be made: {outcome.error}")
        return dict(outcome.figures["paths"])

    def _run_piece(self, module: str, arguments: Mapping[str, Any], timeout_seconds: float) -> Outcome:
        environment = {"QLORA_TRAIN_CACHE": str(self.folder / "quantized")}
        return run_piece(module, arguments, timeout_seconds=timeout_seconds, environment=environment)

    def _take(self, case: Case, turn: _Turns, settings: Mapping[str, Any], number: int) -> None:
        self.log(f"{case.name}: {turn.contender.name}, run {number + 1}")
        arguments = {**settings, **turn.contender.arguments}
        outcome = self._run_piece(turn.contender.module, arguments, case.timeout_seconds)
        if outcome.others_num_cores > DISTURBED_NUM_CORES:
            self.log(f"disturbed: other processes kept {outcome.others_num_cores:.1f} cores busy")
        figures = _figures(outcome)
        record.append(
            self.records,
            case.suite,
            {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "case": case.name,
                "contender": turn.contender.name,
                "run": number,
                "figures": figures,
                "error": outcome.error,
                "settings": {key: value for key, value in arguments.items() if key != "inputs"},
                "inputs": dict(case.inputs),
                "machine": dict(self.machine),
            },
        )
        if figures is None:
            last_line = str(outcome.error).splitlines()[-1]
            turn.word, turn.has_failed = f"failed: {last_line}", True
            self.log(str(outcome.error))
        else:
            turn.runs.append(figures)


def _figures(outcome: Outcome) -> dict[str, Any] | None:
    if outcome.figures is None:
        return None
    return {
        **outcome.figures,
        "whole_process_seconds": outcome.seconds,
        "others_num_cores": outcome.others_num_cores,
    }


def _row(case: Case, turn: _Turns) -> Row:
    name = turn.contender.name
    is_reference = name == case.reference
    return Row(case.name, name, tuple(turn.runs), turn.word, is_reference, turn.has_failed)
