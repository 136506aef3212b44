"""Records of the GPU suite as text: one table, what failed and why, where the time and the memory of a traced
step went."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from benchmarks.gpu_suite.stages import Stage
from benchmarks.table import Column, Row, build_table, rate, seconds, share
from qlora_train.plan.words import gib

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
WIDTH = 220
Record = Mapping[str, Any]


def _number(value: float) -> str:
    return f"{value:.0f}"


COLUMNS = (
    Column("num_passed", "passed", _number),
    Column("num_failed", "failed", _number),
    Column("num_skipped", "skipped", _number),
    Column("tokens_per_second", "tokens/s", rate),
    Column("step_seconds", "a step", seconds),
    Column("planned_step_device_bytes", "planned", gib),
    Column("measured_step_device_bytes", "measured", gib),
    Column("device_peak_bytes", "allocated", gib),
    Column("device_reserved_peak_bytes", "reserved", gib),
    Column("context_bytes", "context", gib),
    Column("share_of_matmul_ceiling", "of matmul", share),
    Column("copied_gb_per_second", "copied GB/s", rate),
    Column("load_seconds", "load", seconds),
    Column("host_bound_share", "host-bound", share),
    Column("base_eval_loss", "base's loss", "{:.4f}".format),
    Column("last_loss", "loss", "{:.4f}".format),
    Column("eval_loss", "held-out loss", "{:.4f}".format),
)
POINT_COLUMNS = (
    Column("milliseconds", "ms", "{:.3f}".format),
    Column("kernel_milliseconds", "of kernels", "{:.3f}".format),
    Column("num_kernels", "kernels", _number),
    Column("host_milliseconds", "host ms", "{:.3f}".format),
    Column("gb_per_second", "GB/s", rate),
    Column("tflops_per_second", "TFLOP/s", rate),
)


def newest(records: Sequence[Record], stage: str) -> Record | None:
    """The last record of a stage."""
    return next((found for found in reversed(records) if found["stage"] == stage), None)


def report_of(
    stages: Sequence[Stage], records: Sequence[Record], machine: Mapping[str, Any]
) -> tuple[str, bool]:
    """The report, and whether every stage has passed or is skipped. machine: of this call; records of another
    commit or GPU say so."""
    found = {stage.name: newest(records, stage.name) for stage in stages}
    gpu, versions = machine["gpu"] or {}, machine["versions"]
    screen = io.StringIO()
    console = Console(file=screen, width=WIDTH, highlight=False)

    def log(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    log(
        f"{gpu.get('name', 'no GPU')}, driver {gpu.get('driver')}, torch {versions.get('torch')}, "
        f"commit {machine['commit']}"
    )
    rows = [row for stage in stages for row in _rows(stage, found[stage.name], machine)]
    places = {case: place for place, case in enumerate(dict.fromkeys(row.case for row in rows))}
    console.print(build_table(sorted(rows, key=lambda row: places[row.case]), COLUMNS, {}))
    for record in found.values():
        if points := ((record or {}).get("figures") or {}).get("points"):
            console.print(build_table(list(_rows_of_points(points)), POINT_COLUMNS, {}))
    for stage in stages:
        for line in _details(stage, found[stage.name]):
            log(line)
    outcomes = [record["outcome"] if record else "not begun" for record in found.values()]
    log(", ".join(f"{outcomes.count(word)} {word}" for word in dict.fromkeys(outcomes)))
    return screen.getvalue(), set(outcomes) <= {PASSED, SKIPPED}


def _rows(stage: Stage, found: Record | None, machine: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each run; at least one."""
    word = found["outcome"] if found else "not begun"
    taken_on = found["machine"] if found else machine
    if taken_on["commit"] != machine["commit"]:
        word += f" at {str(taken_on['commit'])[:12]}"
    if taken_on["gpu"] != machine["gpu"]:
        word += f" on {(taken_on['gpu'] or {}).get('name', 'no GPU')}"
    runs = ((found or {}).get("figures") or {}).get("runs") or {}
    case = stage.case or stage.name
    if not runs:
        yield Row(case, stage.name, word=word)
    is_compared = stage.is_reference or (not stage.case and len(runs) > 1 and stage.name != "smoke")
    for number, (name, figures) in enumerate(runs.items()):
        first = number == 0
        yield Row(case, name, (figures,), word if first else "", is_reference=first and is_compared)


def _rows_of_points(points: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[Row]:
    """Ratios of a point are against its first way, which is the product's."""
    for point, ways in points.items():
        for number, (way, figures) in enumerate(ways.items()):
            yield Row(point, way, (figures,), is_reference=number == 0)


def _details(stage: Stage, found: Record | None) -> Iterator[str]:
    """What numbers of a table do not say."""
    if found is None:
        return
    figures = found["figures"] or {}
    if found["error"]:
        yield f"{stage.name}: {found['outcome'].upper()}: {found['error']}"
    for problem in figures.get("problems", ()):
        yield f"{stage.name}: FAILED: {problem}"
    for remark in figures.get("remarks", ()):
        yield f"{stage.name}: {remark}"
    for run in figures.get("runs", {}).values():
        yield from _profile(run.get("profile"))
        yield from _allocator(run.get("allocator"))


def _profile(table: Mapping[str, Any] | None) -> Iterator[str]:
    if table is None:
        return
    kinds = ", ".join(f"{kind} {value:.1%}" for kind, value in table["kinds"].items())
    yield (
        f"  a step of {table['step_milliseconds']:.1f} ms, {table['num_kernels']} kernels, busy "
        f"{table['busy_share']:.1%}: {kinds}"
    )
    for name, count, milliseconds, part in table["kernels"]:
        yield f"    {part:6.1%} {milliseconds:9.2f} ms {count:6} x  {name}"


def _allocator(table: Mapping[str, Any] | None) -> Iterator[str]:
    if table is None:
        return
    yield (
        f"  allocator: {gib(table['allocated_bytes'])} of {gib(table['reserved_bytes'])} reserved in "
        f"{table['num_segments']} segments, {gib(table['peak_bytes'])} more at the peak of the step, held by"
    )
    for place, num_bytes in table["held_at_peak"]:
        yield f"    {num_bytes / 2**20:9.1f} MiB  {place}"
