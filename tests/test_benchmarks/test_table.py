"""The printed table: medians, ratios against the reference, words for what is missing."""

from __future__ import annotations

import io

from benchmarks.table import Column, Row, build_table, median_figures, rate
from rich.console import Console

from qlora_train.plan.words import gib

COLUMNS = (
    Column("tokens_per_second", "tokens/s", rate),
    Column("process_peak_bytes", "peak", gib),
    Column("merge_seconds", "merge", rate),
)


def figures(tokens_per_second: float, process_peak_bytes: int) -> dict[str, float]:
    return {"tokens_per_second": tokens_per_second, "process_peak_bytes": process_peak_bytes}


def lines_of(rows: list[Row], targets: dict[str, str]) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=200).print(build_table(rows, COLUMNS, targets))
    return [line.rstrip() for line in output.getvalue().splitlines() if line.strip()]


def test_medians_are_of_what_every_run_has() -> None:
    runs = [{"a": 1, "b": 5.0, "c": "x", "d": True}, {"a": 9, "b": 3.0, "c": "x"}, {"a": 2, "c": "x"}]
    assert median_figures(runs) == {"a": 2}
    assert median_figures([]) == {}


def test_the_table_compares_with_the_reference_of_each_case() -> None:
    rows = [
        Row("fast", "ours", tuple(figures(speed, 2**30) for speed in (390, 400, 900))),
        Row("fast", "peer", (figures(200.0, 2**31),), is_reference=True),
        Row("fast", "other", word="skipped: other not installed"),
        Row("slow", "ours", (figures(8.0, 2**30),)),
        Row("slow", "peer", word="failed: out of memory", is_reference=True),
    ]
    heading, _, *body = lines_of(rows, {"fast": ">= 2x tokens/s", "slow": ""})
    assert "tokens/s" in heading and "peak" in heading and "merge" not in heading
    ours, peer, other, alone, failed = body
    assert ours.split()[:3] == ["fast", "ours", "3"]
    assert "400 (2.00x)" in ours and "1.00 GiB (0.50x)" in ours and ours.endswith("target: >= 2x tokens/s")
    assert "200" in peer and "x)" not in peer and "target" not in peer
    assert other.split()[:2] == ["other", "0"] and other.endswith("skipped: other not installed")
    assert alone.split() == ["slow", "ours", "1", "8", "1.00", "GiB"]
    assert failed.endswith("failed: out of memory")
