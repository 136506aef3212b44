"""Running cases: turns, records, skip words, failures; and the command around it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks import record
from benchmarks.__main__ import main
from benchmarks.case import Case, Contender
from benchmarks.cases import CASES
from benchmarks.command import run_bench
from benchmarks.runner import Bench
from rich.console import Console

from qlora_train.errors import QloraTrainError

MakePiece = Callable[[str, str], str]
MACHINE: dict[str, Any] = {"cpu": "some", "gpu": None}


def bench_in(folder: Path, said: list[str]) -> Bench:
    return Bench(folder / "inputs", folder / "records", MACHINE, said.append)


def test_contenders_take_turns_and_every_other_round_goes_backwards(
    make_piece: MakePiece, tmp_path: Path
) -> None:
    module = make_piece("piece", "return {'x_seconds': arguments['a'] * arguments['b']}")
    contenders = tuple(Contender(name, module, {"b": b}) for name, b in (("ours", 2), ("peer", 3)))
    case = Case("named", "about", contenders, "peer", {"a": 5}, suite="tests")
    said: list[str] = []
    rows = bench_in(tmp_path, said).run(case, 3)
    assert [(r.contender, len(r.runs), r.is_reference, r.word) for r in rows] == [
        ("ours", 3, False, ""),
        ("peer", 3, True, ""),
    ]
    records = record.read(tmp_path / "records", "tests")
    assert [r["contender"] for r in records] == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert [r["run"] for r in records] == [0, 0, 1, 1, 2, 2]
    first = records[0]
    assert first["case"] == "named" and first["machine"] == MACHINE and first["error"] is None
    assert first["settings"] == {"a": 5, "b": 2} and first["date"].endswith("+00:00")
    figures = first["figures"]
    assert figures["x_seconds"] == 10 and figures["process_peak_bytes"] > 0
    assert figures["whole_process_seconds"] > 0
    assert said[0] == "named: ours, run 1"


def test_a_failure_is_recorded_once_and_stops_nobody_else(make_piece: MakePiece, tmp_path: Path) -> None:
    broken = make_piece("broken", "raise RuntimeError('no memory left')")
    works = make_piece("works", "return {'x_seconds': 1}")
    case = Case("named", "about", (Contender("ours", works), Contender("peer", broken)), "peer")
    ours, peer = bench_in(tmp_path, []).run(case, 2)
    assert len(ours.runs) == 2 and not ours.word
    assert not peer.runs and peer.word == "failed: RuntimeError: no memory left"
    assert peer.has_failed and not ours.has_failed
    records = record.read(tmp_path / "records", "speed")
    assert [(r["contender"], r["figures"] is None) for r in records] == [
        ("ours", False),
        ("peer", True),
        ("ours", False),
    ]
    assert "RuntimeError: no memory left" in records[1]["error"]


def test_what_cannot_run_here_is_skipped_with_a_word(tmp_path: Path) -> None:
    absent = Contender("peer", "nowhere", requires=("json", "no_such_package"))
    bench = bench_in(tmp_path, [])
    (row,) = bench.run(Case("a", "about", (absent,), "peer"), 1)
    assert row.word == "skipped: no_such_package not installed"
    on_gpu = Case("b", "about", (Contender("ours", "nowhere"),), "ours", needs_cuda=True)
    assert [row.word for row in bench.run(on_gpu, 1)] == ["skipped: no CUDA device"]
    assert not (tmp_path / "records").exists()


def test_the_command_prints_one_table_and_keeps_the_figures(make_piece: MakePiece, tmp_path: Path) -> None:
    module = make_piece("piece", "return {'load_seconds': arguments['s'], 'process_peak_bytes': 2**31}")
    contenders = (Contender("ours", module, {"s": 2.0}), Contender("peer", module, {"s": 4.0}))
    case = Case("named", "about", contenders, "peer", target="<= 0.6x")
    output = io.StringIO()
    console = Console(file=output, width=80)
    run_bench(["named"], num_runs=1, records=tmp_path / "r", console=console, cases={"named": case})
    text = output.getvalue()
    assert "2.0 s (0.50x)" in text and "2.00 GiB (1.00x)" in text and "target: <= 0.6x" in text
    assert len(record.read(tmp_path / "r", "speed")) == 2


def test_the_command_shows_its_table_before_it_says_what_failed(
    make_piece: MakePiece, tmp_path: Path
) -> None:
    works, broken = make_piece("works", "return {'load_seconds': 2.0}"), make_piece("broken", "1 / 0")
    case = Case("named", "about", (Contender("ours", works), Contender("peer", broken)), "peer")
    output = io.StringIO()
    with pytest.raises(QloraTrainError, match="^failed: peer in named; the records in "):
        run_bench([], num_runs=1, records=tmp_path, console=Console(file=output), cases={"named": case})
    assert "2.0 s" in output.getvalue() and "ZeroDivisionError" in output.getvalue()


def test_the_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CASES)


def test_an_unknown_case_is_a_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu-200m-kep"]) == 2
    assert "cpu-200m-kep: no such case" in capsys.readouterr().err
