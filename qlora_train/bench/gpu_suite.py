"""Everything that needs a GPU, by one command: tests marked `gpu`, the memory cases, the speed cases.

    make gpu-suite                               all that is not recorded yet, then the tables
    make gpu-suite STOP_AFTER=580                ends before a limit of 10 minutes; run it again to go on
    make gpu-suite ONLY="tests memory-8b-4gib"   by kind (tests, memory, speed) or name
    make gpu-suite AGAIN=1                       also what is recorded already

A stage is one run of one contender of one case, a test file being a case: a process of its own, less than ten
minutes. What it gave is written when it ends; a stage that is recorded for this program on this machine is
skipped, so the suite can be stopped anywhere and run again. A stage cut short because the time of the call
was over is not recorded and comes again; one that takes longer than a stage may is recorded as failed.

"This program on this machine": GPU, torch, and a hash of the sources, which serves also where there is no git
and where files differ from the commit. What a case gives is in `<suite>.jsonl` (record.py).

Packed bases lie in shared memory where it has room for the largest with as much again to pin, else beside the
records; when the memory cases are through they are removed. Exit code 0: all done and nothing failed; 1: all
done, something failed; 75: stages are left, run it again.

Imports no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from qlora_train.bench import memory_suite, record, speed_suite
from qlora_train.bench.case import Case, Contender
from qlora_train.bench.command import COLUMNS as SPEED_COLUMNS
from qlora_train.bench.command import TABLE_WIDTH
from qlora_train.bench.machine import describe_machine
from qlora_train.bench.runner import Bench
from qlora_train.bench.table import Column, Row, build_table

REPOSITORY = Path(__file__).parents[2]
SOURCES = ("qlora_train", "tests")
TESTS_PIECE = "qlora_train.bench.pieces.gpu_tests"
TESTS_SUITE = "gpu-tests"
STAGE_SECONDS, LEAST_SECONDS = 570.0, 60.0
"""The most that one stage may take; with less than the least left of the call, none is begun."""
NUM_SPEED_RUNS = 3
LEFT_OVER = 75
SHARED_MEMORY = Path("/dev/shm")
BASES = "qlora-train-gpu-suite"
LARGEST_BASE_BYTES, SPARE_BYTES = 42 * 10**9, 12 * 10**9
TEST_COLUMNS = tuple(
    Column(f"num_{outcome}", outcome, "{:.0f}".format) for outcome in ("passed", "failed", "skipped")
)


@dataclass(frozen=True)
class Part:
    """One kind of cases: how often each contender runs, and how they are shown."""

    name: str
    cases: tuple[Case, ...]
    columns: Sequence[Column]
    num_runs: Callable[[Case], int] = lambda case: 1


@dataclass(frozen=True)
class Stage:
    """Run number `number` (from 0) of a case's only contender."""

    case: Case
    number: int

    @property
    def contender(self) -> str:
        return self.case.reference


def stages_of(part: Part) -> Iterator[Stage]:
    """Contenders take turns, every other round backwards."""
    for case in part.cases:
        for number in range(part.num_runs(case)):
            for contender in case.contenders if number % 2 == 0 else reversed(case.contenders):
                limit = min(case.timeout_seconds, STAGE_SECONDS)
                alone = replace(
                    case, contenders=(contender,), reference=contender.name, timeout_seconds=limit
                )
                yield Stage(alone, number)


@dataclass
class Suite:
    """records: the folder of the figures. folder_of: where a part makes its inputs and bases. machine:
    `this_machine()`. seconds_left: of this call. say: told a line each. words: why contenders were not run.
    """

    records: Path
    folder_of: Callable[[str], Path]
    machine: Mapping[str, Any]
    say: Callable[[str], None]
    seconds_left: Callable[[], float] = lambda: float("inf")
    words: dict[tuple[str, str], str] = field(default_factory=dict)

    def run(self, part: Part, *, again: bool = False) -> int:
        """Take the stages that are not recorded; returns how many are left. again: take all of them."""
        num_left = 0
        before = {} if not again else {case.name: self._records_of(case) for case in part.cases}
        for stage in stages_of(part):
            ignored = len(before.get(stage.case.name, []))
            done = [r for r in self._records_of(stage.case)[ignored:] if r["contender"] == stage.contender]
            if len(done) > stage.number:
                continue
            if self.seconds_left() < LEAST_SECONDS or not self._take(part, stage):
                num_left += 1
        return num_left

    def rows(self, part: Part) -> list[Row]:
        """What is recorded, newest runs first in number; see `Part.num_runs`."""
        rows = []
        for case in part.cases:
            found = self._records_of(case)
            for contender in case.contenders:
                mine = [r for r in found if r["contender"] == contender.name][-part.num_runs(case) :]
                rows.append(self._row(case, contender, mine))
        return rows

    def _take(self, part: Part, stage: Stage) -> bool:
        """False where the call's time cut the stage short."""
        limit = min(stage.case.timeout_seconds, self.seconds_left())
        case = replace(stage.case, timeout_seconds=limit)
        with tempfile.TemporaryDirectory(prefix="qlora-suite-") as scratch:
            bench = Bench(self.folder_of(part.name), Path(scratch), self.machine, self.say)
            (row,) = bench.run(case, 1)
            self.words[case.name, stage.contender] = row.word
            found = record.read(Path(scratch), case.suite)
        if limit < stage.case.timeout_seconds and any(was_cut(one) for one in found):
            self.say(f"{case.name}: cut short after {limit:.0f} s; it comes again")
            return False
        for one in found:
            record.append(self.records, case.suite, one | {"run": stage.number})
        return True

    def _records_of(self, case: Case) -> list[dict[str, Any]]:
        """Of this program on this machine."""
        found = record.read(self.records, case.suite)
        return [r for r in found if r["case"] == case.name and _key(r["machine"]) == _key(self.machine)]

    def _row(self, case: Case, contender: Contender, records: Sequence[Mapping[str, Any]]) -> Row:
        runs = tuple(r["figures"] for r in records if r["figures"] is not None)
        errors = [str(r["error"]).splitlines()[-1] for r in records if r["figures"] is None]
        word = self.words.get((case.name, contender.name), "") if not records else ""
        if errors:
            word = f"failed: {errors[-1]}"
        row = Row(case.name, contender.name, runs, word or ("" if records else "not run"))
        return replace(row, word=memory_suite.remarks(row), is_reference=contender.name == case.reference)


def was_cut(found: Mapping[str, Any]) -> bool:
    """Whether a record says that the time was over (process.py)."""
    return str(found["error"] or "").startswith("not finished")


def failures(rows: Iterable[Row]) -> list[str]:
    """What of it did not go well, in words."""
    found = []
    for row in rows:
        num_failed = sum(run.get("num_failed", 0) for run in row.runs)
        if row.word.startswith("failed") or num_failed or any(run.get("held") is False for run in row.runs):
            found.append(f"{row.case}, {row.contender}: {row.word or f'{num_failed} tests failed'}")
    return found


def parts() -> tuple[Part, ...]:
    """Tests, memory, speed."""
    return (
        Part("tests", tuple(cases_of_tests()), TEST_COLUMNS),
        Part(
            "memory",
            memory_suite.CASES,
            memory_suite.COLUMNS,
            lambda case: memory_suite.NUM_RUNS.get(case.name, 1),
        ),
        Part(
            "speed",
            tuple(case for case in speed_suite.CASES if case.needs_cuda),
            SPEED_COLUMNS,
            lambda case: NUM_SPEED_RUNS,
        ),
    )


def cases_of_tests(marks: str = "gpu", repository: Path = REPOSITORY) -> Iterator[Case]:
    """A case per test file that mentions the mark."""
    for file in sorted((repository / "tests").rglob("test_*.py")):
        if f"mark.{marks}" in file.read_text(encoding="utf-8"):
            name = str(file.relative_to(repository))
            contender = Contender("pytest", TESTS_PIECE, {"file": str(file), "marks": marks}, ("pytest",))
            yield Case(
                name, "", (contender,), "pytest", needs_cuda=True, timeout_seconds=540.0, suite=TESTS_SUITE
            )


def this_machine(commit: str | None) -> dict[str, Any]:
    """`describe_machine`, the hash of the sources, and `commit` where git knows none."""
    machine = describe_machine()
    return machine | {"commit": machine["commit"] or commit or None, "sources": hash_of_sources()}


def hash_of_sources(repository: Path = REPOSITORY) -> str:
    """Of every Python file of package and tests."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (repository / folder).rglob("*.py")):
        digest.update(f"{file.relative_to(repository)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _key(machine: Mapping[str, Any]) -> tuple[Any, ...]:
    """What has to be equal for figures to be of one program on one machine."""
    gpu = machine["gpu"] or {}
    return machine.get("sources"), gpu.get("name"), machine["versions"].get("torch")


def folder_of_bases(records: Path, shared: Path = SHARED_MEMORY) -> Path:
    """Where packed bases are made, and removed when they have served."""
    in_memory = shared / BASES
    if in_memory.is_dir():  # of an earlier call
        return in_memory
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > LARGEST_BASE_BYTES
    ram_bytes = psutil.virtual_memory().available
    return in_memory if has_room and ram_bytes > 2 * LARGEST_BASE_BYTES + SPARE_BYTES else records / BASES


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    args = _parser().parse_args(arguments)
    ends = time.monotonic() + (args.stop_after or float("inf"))
    console = Console(width=max(Console().width, TABLE_WIDTH), highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    machine = this_machine(args.commit)
    if machine["gpu"] is None:
        say("no CUDA device is here (nvidia-smi finds none): there is nothing to run")
        return 2
    bases = args.bases / BASES if args.bases else folder_of_bases(args.record)
    suite = Suite(
        args.record,
        lambda part: bases if part == "memory" else args.record / "inputs",
        machine,
        say,
        lambda: ends - time.monotonic(),
    )
    chosen = list(_chosen(parts(), args.only))
    num_left = 0
    for part in chosen:
        num_left += (left := suite.run(part, again=args.again))
        if part.name == "memory" and not left:
            shutil.rmtree(bases, ignore_errors=True)
    gpu = machine["gpu"]
    say(f"{gpu['name']}, driver {gpu['driver']}, torch {machine['versions']['torch']}, {machine['commit']}")
    bad: list[str] = []
    for part in chosen:
        rows = suite.rows(part)
        bad += failures(rows)
        console.print(build_table(rows, part.columns, {case.name: case.target for case in part.cases}))
    for line in bad:
        say(f"FAILED {line}")
    say(f"records in {args.record}" + (f"; {num_left} stages are left, run it again" if num_left else ""))
    return LEFT_OVER if num_left else int(bool(bad))


def _chosen(all_parts: Sequence[Part], only: Sequence[str]) -> Iterator[Part]:
    """Parts by name, cases by name; all where nothing is named."""
    for part in all_parts:
        cases = tuple(c for c in part.cases if not only or part.name in only or c.name in only)
        if cases:
            yield replace(part, cases=cases)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qlora_train.bench.gpu_suite")
    parser.add_argument("--record", type=Path, default=Path("build/gpu-suite"), metavar="DIR")
    parser.add_argument(
        "--bases", type=Path, metavar="DIR", help="for packed bases (40 GB); removed at the end"
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="parts, or cases by name")
    parser.add_argument("--again", action="store_true", help="also what is recorded")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin nothing that ends later")
    parser.add_argument("--commit", help="where git is not there to say it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
