"""The suite of stages: what is taken, what is skipped, what comes again; and a test file as a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_train.bench import gpu_suite, record
from qlora_train.bench.case import Case, Contender
from qlora_train.bench.gpu_suite import Part, Suite, cases_of_tests, failures, hash_of_sources, stages_of
from qlora_train.bench.process import run_piece
from qlora_train.bench.table import Column

MakePiece = Callable[[str, str], str]
LIGHT = """
import json, sys
from pathlib import Path
def measure(arguments):
{body}
Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
"""
MACHINE: dict[str, Any] = {
    "gpu": {"name": "some"},
    "versions": {"torch": "2"},
    "sources": "aa",
    "commit": "c",
}
COLUMNS = (Column("x_seconds", "x", "{:.0f}".format),)
COUNT = """
file = Path(arguments['log'])
old = file.read_text() if file.is_file() else ''
file.write_text(old + arguments['name'] + ' ')
return {'x_seconds': len(old.split())}
""".strip()


def case_of(module: str, log: Path, *names: str, **changes: Any) -> Case:
    contenders = tuple(Contender(name, module, {"name": name, "log": str(log)}) for name in names)
    return Case("named", "about", contenders, names[0], suite="stages", needs_cuda=True, **changes)


def suite_in(folder: Path, machine: dict[str, Any] = MACHINE, seconds_left: float = 1e9) -> Suite:
    said: list[str] = []
    return Suite(folder, lambda part: folder / part, machine, said.append, lambda: seconds_left)


@pytest.fixture
def make_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePiece:
    """As in conftest.py, but importing no torch: these tests start dozens."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name: str, body: str) -> str:
        indented = "\n".join(f"    {line}" for line in body.split("\n"))
        (tmp_path / f"{name}.py").write_text(LIGHT.format(body=indented))
        return name

    return make


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def part(make_piece: MakePiece, log: Path) -> Part:
    case = case_of(make_piece("counted", COUNT), log, "a", "b")
    return Part("memory", (case,), COLUMNS, lambda case: 2)


def test_stages_take_turns(part: Part) -> None:
    stages = [(stage.contender, stage.number) for stage in stages_of(part)]
    assert stages == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert all(stage.case.timeout_seconds <= gpu_suite.STAGE_SECONDS for stage in stages_of(part))


def test_what_is_recorded_is_not_taken_again(part: Part, log: Path, tmp_path: Path) -> None:
    assert suite_in(tmp_path).run(part) == 0
    assert log.read_text() == "a b b a "
    assert suite_in(tmp_path).run(part) == 0
    assert log.read_text() == "a b b a "
    found = record.read(tmp_path, "stages")
    assert [(r["contender"], r["run"]) for r in found] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert all(r["machine"] == MACHINE for r in found)
    suite_in(tmp_path).run(part, again=True)
    assert log.read_text() == "a b b a a b b a "


def test_it_goes_on_where_it_stopped(part: Part, log: Path, tmp_path: Path) -> None:
    suite_in(tmp_path).run(replace(part, num_runs=lambda case: 1))
    assert log.read_text() == "a b "
    suite_in(tmp_path).run(part)
    assert log.read_text() == "a b b a "


@pytest.mark.parametrize(
    "change", [{"sources": "bb"}, {"gpu": {"name": "other"}}, {"versions": {"torch": "3"}}]
)
def test_other_sources_or_another_machine_begin_anew(
    part: Part, log: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    suite_in(tmp_path).run(part)
    other = suite_in(tmp_path, MACHINE | change)
    assert [row.word for row in other.rows(part)] == ["not run", "not run"]
    other.run(part)
    assert log.read_text() == "a b b a a b b a "


def test_another_commit_of_the_same_sources_does_not(part: Part, log: Path, tmp_path: Path) -> None:
    suite_in(tmp_path).run(part)
    suite_in(tmp_path, MACHINE | {"commit": "d"}).run(part)
    assert log.read_text() == "a b b a "


def test_nothing_is_begun_when_the_time_of_the_call_is_over(part: Part, log: Path, tmp_path: Path) -> None:
    assert suite_in(tmp_path, seconds_left=59).run(part) == 4
    assert not log.exists() and record.read(tmp_path, "stages") == []


def test_a_stage_cut_short_by_the_call_comes_again(
    make_piece: MakePiece, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 0.1)
    slow = make_piece("slow", "import time\ntime.sleep(60)\nreturn {}")
    cut = Part("memory", (case_of(slow, log, "a"),), COLUMNS)
    assert suite_in(tmp_path, seconds_left=1.0).run(cut) == 1
    assert record.read(tmp_path, "stages") == []


def test_a_stage_that_takes_too_long_or_fails_is_a_failure_and_stays_one(
    make_piece: MakePiece, log: Path, tmp_path: Path
) -> None:
    slow = make_piece("slow", "import time\ntime.sleep(60)\nreturn {}")
    bad = make_piece("bad", "raise RuntimeError('broken')")
    too_long = replace(case_of(slow, log, "a", timeout_seconds=1.0), name="too long")
    broken = replace(case_of(bad, log, "a"), name="broken")
    part = Part("memory", (too_long, broken), COLUMNS)
    suite = suite_in(tmp_path)
    assert suite.run(part) == 0 and suite.run(part) == 0
    assert len(record.read(tmp_path, "stages")) == 2
    assert [line.partition(" (")[0] for line in failures(suite.rows(part))] == [
        "too long, a: failed: not finished after 1 s",
        "broken, a: failed: RuntimeError: broken",
    ]


def test_rows_show_what_is_recorded_of_each_contender(part: Part, tmp_path: Path) -> None:
    suite = suite_in(tmp_path)
    suite.run(part)
    rows = suite.rows(part)
    assert [[run["x_seconds"] for run in row.runs] for row in rows] == [[0, 3], [1, 2]]
    assert [row.is_reference for row in rows] == [True, False] and failures(rows) == []


def test_who_cannot_run_is_skipped_with_a_word_and_is_no_failure(tmp_path: Path) -> None:
    absent = Contender("peer", "nowhere", requires=("no_such_package",))
    part = Part("speed", (Case("named", "about", (absent,), "peer", suite="stages"),), COLUMNS)
    suite = suite_in(tmp_path)
    assert suite.run(part) == 0
    (row,) = suite.rows(part)
    assert row.word == "skipped: no_such_package not installed" and failures([row]) == []


TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("x", [1, 2, 3])
def test_some(x):
    print("x is", x)
    if x == 2:
        pytest.skip("not now")
    assert x == 1

@pytest.fixture
def broken():
    raise OSError("no disk")

@pytest.mark.gpu
def test_set_up(broken):
    pass

def test_elsewhere():
    raise AssertionError("not marked")
"""


def test_a_file_of_tests_is_a_stage(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "deep"
    folder.mkdir(parents=True)
    (folder / "test_it.py").write_text(TESTS)
    (folder / "test_other.py").write_text("def test_cpu():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    (case,) = cases_of_tests(repository=tmp_path)
    assert case.name == "tests/deep/test_it.py"
    contender = case.contenders[0]
    outcome = run_piece(contender.module, contender.arguments, timeout_seconds=120)
    figures = outcome.figures
    assert figures is not None, outcome.error
    assert [figures[f"num_{what}"] for what in ("passed", "failed", "skipped")] == [1, 2, 1]
    assert figures["printed"] == ["x is 1", "x is 2", "x is 3"]
    assert [name.rpartition("::")[2] for name in figures["failures"]] == ["test_some[3]", "test_set_up"]
    assert "OSError: no disk" in list(figures["failures"].values())[1]
    row = suite_in(tmp_path).rows(Part("tests", (case,), COLUMNS))[0]
    assert failures([replace(row, runs=(figures,), word="")]) == [f"{case.name}, pytest: 2 tests failed"]


def test_the_comparison_of_plan_and_meter_is_among_the_tests() -> None:
    names = [case.name for case in cases_of_tests()]
    assert "tests/memory/plan/test_plan_matches_meter.py" in names


def test_the_hash_is_of_package_and_tests(tmp_path: Path) -> None:
    for folder in ("qlora_train", "tests", "recipes"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1")
    before = hash_of_sources(tmp_path)
    (tmp_path / "recipes" / "a.py").write_text("2")
    assert hash_of_sources(tmp_path) == before
    (tmp_path / "tests" / "a.py").write_text("2")
    assert hash_of_sources(tmp_path) != before


@pytest.mark.parametrize(
    ("free_gb", "ram_gb", "in_memory"), [(60, 130, True), (30, 130, False), (60, 90, False)]
)
def test_bases_lie_in_shared_memory_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gb: int, ram_gb: int, in_memory: bool
) -> None:
    monkeypatch.setattr(gpu_suite.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gb * 10**9))
    ram = SimpleNamespace(available=ram_gb * 10**9)
    monkeypatch.setattr(gpu_suite.psutil, "virtual_memory", lambda: ram)
    shared = tmp_path / "shm"
    shared.mkdir()
    folder = gpu_suite.folder_of_bases(tmp_path / "records", shared)
    assert folder.parent == (shared if in_memory else tmp_path / "records")
    (shared / gpu_suite.BASES).mkdir()  # of an earlier call, which has taken the room
    assert gpu_suite.folder_of_bases(tmp_path / "records", shared).parent == shared


def test_the_command_takes_what_is_chosen_prints_tables_and_says_what_is_left(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = {"name": "some", "driver": "580"}
    monkeypatch.setattr(gpu_suite, "this_machine", lambda commit: MACHINE | {"gpu": gpu, "commit": commit})
    monkeypatch.setattr(gpu_suite, "parts", lambda: (part,))
    command = ["--record", str(tmp_path / "r"), "--bases", str(tmp_path / "b"), "--commit", "abc", "--only"]
    bases = tmp_path / "b" / gpu_suite.BASES
    bases.mkdir(parents=True)
    assert gpu_suite.main([*command, "memory", "--stop-after", "5"]) == gpu_suite.LEFT_OVER
    assert "4 stages are left, run it again" in capsys.readouterr().out and bases.is_dir()
    assert gpu_suite.main([*command, "named"]) == 0
    out = capsys.readouterr().out
    assert "some, driver 580, torch 2, abc" in out and "named" in out
    assert (tmp_path / "b").is_dir() and not bases.exists()
    assert gpu_suite.main([*command, "nothing"]) == 0


def test_without_a_gpu_there_is_nothing_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_suite, "this_machine", lambda commit: MACHINE | {"gpu": None})
    assert gpu_suite.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out
