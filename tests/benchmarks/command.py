"""`make bench`: run named cases, print one table, keep the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.case import Case
from benchmarks.cases import CASES, choose
from benchmarks.machine import describe_machine
from benchmarks.runner import Bench
from benchmarks.table import Column, build_table, rate, seconds, share
from qlora_train.errors import QloraTrainError
from qlora_train.plan.words import gib

COLUMNS = (
    Column("tokens_per_second", "tokens/s", rate),
    Column("process_peak_bytes", "peak of the process", gib),
    Column("device_peak_bytes", "peak on the device", gib),
    Column("first_step_seconds", "to the first step", seconds),
    Column("load_seconds", "load", seconds),
    Column("merge_seconds", "merge", seconds),
    Column("merge_to_disk_seconds", "merge, on disk", seconds),
    Column("useful_gflops_per_second", "useful GFLOP/s", rate),
    Column("share_of_matmul_ceiling", "of measured matmul", share),
    Column("copied_gb_per_second", "copied GB/s", rate),
    Column("share_of_copy_ceiling", "of measured copy", share),
    Column("dequantized_gb_per_second", "dequantized GB/s", rate),
)
TABLE_WIDTH = 200
"""Wider than most terminals: a table that wraps its numbers is not read."""


def list_cases(console: Console, cases: Mapping[str, Case] = CASES) -> None:
    """One line per case."""
    width = max(map(len, cases), default=0)
    for case in cases.values():
        console.print(f"{case.name:<{width}}  {case.about}", markup=False, soft_wrap=True)


def run_bench(
    names: Sequence[str],
    *,
    num_runs: int,
    records: Path,
    console: Console,
    cases: Mapping[str, Case] = CASES,
) -> None:
    """Run the named cases, all of them where none is named; print their table.

    Raises `UserError` for an unknown name, `QloraTrainError` where inputs cannot be made and, after the
    table, where something failed.
    """
    chosen = choose(names, cases)
    from qlora_train.weights.cache_key import cache_root

    def log(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    bench = Bench(cache_root() / "bench", records, describe_machine(), log)
    rows = [row for case in chosen for row in bench.run(case, num_runs)]
    targets = {case.name: case.target for case in chosen}
    wide = Console(file=console.file, width=max(console.width, TABLE_WIDTH), highlight=False)
    wide.print(build_table(rows, COLUMNS, targets))
    dtypes = {run["compute_dtype"] for row in rows for run in row.runs if "compute_dtype" in run}
    if dtypes:
        log(f"computed in {', '.join(sorted(dtypes))}")
    log(f"medians of {num_runs}; (x): compared with the contender without one; figures added to {records}")
    failed = [f"{row.contender} in {row.case}" for row in rows if row.has_failed]
    if failed:
        raise QloraTrainError(f"failed: {', '.join(failed)}; the records in {records} say how")
