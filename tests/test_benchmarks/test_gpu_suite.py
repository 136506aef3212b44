"""The command around the GPU suite's stages: what is taken, what comes again, what is kept and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.gpu_suite import command
from benchmarks.gpu_suite.command import Suite, chosen
from benchmarks.gpu_suite.report import newest, report_of
from benchmarks.gpu_suite.stages import Stage
from benchmarks.process import run_piece

MakePiece = Callable[[str, str], str]
MACHINE: dict[str, Any] = {
    "gpu": {"name": "some", "driver": "580"},
    "versions": {"torch": "2"},
    "commit": "c1",
}
COUNT = """
from pathlib import Path
with Path(arguments['log']).open('a') as log:
    log.write(arguments['name'] + ' ')
runs = {arguments['name']: {'tokens_per_second': 400.0}}
return {'runs': runs, 'remarks': ['said'], 'problems': arguments.get('problems', [])}
""".strip()


class Suites:
    """Makes suites over one folder, and stages whose pieces write their names to one log."""

    def __init__(self, folder: Path, make_piece: MakePiece) -> None:
        self.folder, self.said = folder, list[str]()
        self._module = make_piece("counted", COUNT)
        self.log = folder / "log"

    def stage(self, name: str, **changes: Any) -> Stage:
        arguments = {"name": name, "log": str(self.log), **changes.pop("arguments", {})}
        return replace(Stage(name, self._module, arguments, 60.0, least_seconds=1.0), **changes)

    def suite(self, seconds_left: float = 1e9, **machine: Any) -> Suite:
        return Suite(
            self.folder / "out",
            self.folder / "work",
            MACHINE | machine,
            self.said.append,
            lambda: seconds_left,
        )

    def outcomes(self) -> list[tuple[str, str]]:
        return [(r["stage"], r["outcome"]) for r in self.suite().records()]


@pytest.fixture
def suites(tmp_path: Path, make_piece: MakePiece) -> Suites:
    return Suites(tmp_path, make_piece)


def test_every_stage_leaves_a_line_however_it_ends(suites: Suites, make_piece: MakePiece) -> None:
    broken = make_piece("broken", "print('about to')\nraise RuntimeError('no such kernel')")
    stages = [
        suites.stage("good"),
        suites.stage("wrong", arguments={"problems": ["bits differ"]}),
        suites.stage("broken", module=broken),
        suites.stage("absent", requires=("json", "no_such_package"), commands=("no-such-program",)),
    ]
    suites.suite().run(stages)
    assert suites.outcomes() == [
        ("good", "passed"), ("wrong", "failed"), ("broken", "failed"), ("absent", "skipped"),
    ]  # fmt: skip
    good, _, third, absent = suites.suite().records()
    assert good["machine"] == MACHINE and good["seconds"] > 0 and good["date"].endswith("+00:00")
    assert good["figures"]["runs"]["good"]["tokens_per_second"] == 400
    assert "about to" in third["error"] and third["error"].endswith("RuntimeError: no such kernel")
    assert absent["error"] == "not installed: no_such_package, no-such-program"
    assert "  bits differ" in suites.said


def test_what_has_passed_is_not_taken_again_whatever_has_changed(suites: Suites) -> None:
    stages = [suites.stage("good"), suites.stage("wrong", arguments={"problems": ["bits differ"]})]
    suites.suite().run(stages)
    suites.suite(commit="c2", versions={"torch": "3"}).run(stages)
    assert suites.log.read_text() == "good wrong wrong "
    suites.suite().run(stages, again=True)
    assert suites.log.read_text() == "good wrong wrong good wrong "


def test_what_does_not_fit_into_the_time_left_is_not_begun(suites: Suites) -> None:
    stages = [suites.stage("long", least_seconds=100.0), suites.stage("short")]
    suites.suite(seconds_left=60).run(stages)
    assert suites.log.read_text() == "short "
    assert "long: not begun with 55 s left" in suites.said


def test_a_stage_has_its_own_limit_and_that_of_the_call(suites: Suites, make_piece: MakePiece) -> None:
    slow = make_piece("slow", "import time\ntime.sleep(60)")
    stages = [
        suites.stage("too long", module=slow, timeout_seconds=1.5),
        suites.stage("cut", module=slow, timeout_seconds=50.0),
    ]
    suites.suite(seconds_left=command.SECONDS_TO_FINISH + 2).run(stages)
    assert suites.outcomes() == [("too long", "failed"), ("cut", "cut short")]
    error = suites.suite().records()[0]["error"]
    assert error.startswith("not finished after 1.5 s") and "slow.py" in error  # where it was


def test_stages_are_told_where_to_work_and_leave_nothing_elsewhere(
    suites: Suites, make_piece: MakePiece
) -> None:
    body = "import os\nfigures = {k: os.environ[k] for k in ('QLORA_TRAIN_CACHE', 'TMPDIR')} | arguments\n"
    module = make_piece("told", body + "return {'runs': {'x': figures}, 'remarks': [], 'problems': []}")
    suites.suite().run([suites.stage("told", module=module, knows_simulated=True)])
    told = suites.suite().records()[0]["figures"]["runs"]["x"]
    work = str(suites.folder / "work")
    assert told["QLORA_TRAIN_CACHE"].startswith(work) and told["TMPDIR"].startswith(work)
    assert told["work"] == work and told["out"] == str(suites.folder / "out")
    assert told["launcher"] == list(command.PLAINLY)


def test_names_are_chosen_by_their_beginning() -> None:
    stages = [
        Stage(name, "m", {}, 1.0) for name in ("smoke", "tests/gpu/test_a.py", "memory-8b", "memory-70b")
    ]
    assert chosen(stages, []) == tuple(stages)
    assert [stage.name for stage in chosen(stages, ["memory", "tests"])] == [
        "tests/gpu/test_a.py", "memory-8b", "memory-70b",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="memry: no such stage; there are smoke, "):
        chosen(stages, ["memry"])


def test_the_report_compares_within_a_case_and_says_what_failed(suites: Suites) -> None:
    def record(stage: str, word: str, figures: Any = None, error: str | None = None, **changes: Any) -> Any:
        machine = MACHINE | changes
        return {"stage": stage, "outcome": word, "figures": figures, "error": error, "machine": machine}

    def figures(name: str, speed: float, **more: Any) -> dict[str, Any]:
        runs = {name: {"tokens_per_second": speed, **more}}
        return {"runs": runs, "remarks": [f"{name} says"], "problems": []}

    profile = {"step_milliseconds": 12.5, "busy_share": 0.9, "kinds": {"matrix products": 0.5},
               "num_kernels": 4, "kernels": [["gemm_x", 3, 6.25, 0.5]]}  # fmt: skip
    stages = [
        suites.stage("speed", case="8b"),
        suites.stage("other"),
        suites.stage("peer", case="8b", is_reference=True),
        suites.stage("left"),
    ]
    records = [
        record("speed", "failed", error="of earlier"),
        record("speed", "passed", figures("ours", 800.0, profile=profile), commit="c0"),
        record("peer", "passed", figures("theirs", 400.0), gpu={"name": "other"}),
        record("other", "failed", error="exit code 1\nRuntimeError: no kernel"),
    ]
    assert newest(records, "speed") == records[1] and newest(records, "left") is None
    text, is_good = report_of(stages, records, MACHINE)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert lines[0] == "some, driver 580, torch 2, commit c1" and not is_good
    ours = next(line for line in lines if "ours" in line)
    assert "800 (2.00x)" in ours and ours.endswith("passed at c0")
    theirs = next(line for line in lines if "theirs" in line)
    assert lines.index(ours) + 1 == lines.index(theirs) and theirs.endswith("passed on other")
    assert "other: FAILED: exit code 1" in lines and "RuntimeError: no kernel" in lines
    assert "speed: ours says" in lines and "of earlier" not in text
    assert "  a step of 12.5 ms, 4 kernels, busy 90.0%: matrix products 50.0%" in lines
    assert any(line.endswith("3 x  gemm_x") for line in lines)
    assert lines[-1] == "2 passed, 1 failed, 1 not begun"
    assert report_of(stages[:1], records, MACHINE)[1]


def test_points_have_a_table_of_their_own_with_ratios_against_ours(suites: Suites) -> None:
    ways = {
        "ours": {"milliseconds": 0.8, "num_kernels": 25, "gb_per_second": 84.0},
        "torch": {"milliseconds": 0.2, "num_kernels": 1, "gb_per_second": 336.0},
    }
    found = {"runs": {}, "points": {"dropout [9, 9]": ways}, "remarks": [], "problems": []}
    record = {"stage": "points", "outcome": "passed", "figures": found, "error": None, "machine": MACHINE}
    text, is_good = report_of([suites.stage("points")], [record], MACHINE)
    ours, theirs = (line.split() for line in text.splitlines() if "ours" in line or "torch  " in line)
    assert ours == ["dropout", "[9,", "9]", "ours", "1", "0.800", "25", "84"] and is_good
    assert theirs == ["torch", "1", "0.200", "(0.25x)", "1", "(0.04x)", "336", "(4.00x)"]


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["bits differ"], 1)])
def test_the_command_writes_one_folder_and_removes_what_it_worked_with(
    suites: Suites, monkeypatch: pytest.MonkeyPatch, problems: list[str], code: int
) -> None:
    stages = (suites.stage("good", arguments={"problems": problems}), suites.stage("else"))
    monkeypatch.setattr(command, "describe_machine", lambda: MACHINE | {"commit": None})
    monkeypatch.setattr(command, "stages_of", lambda size, tests: stages)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    out, work = suites.folder / "here", suites.folder / "there"
    arguments = ["--out", str(out), "--work", str(work), "--commit", "abc", "--only", "good"]
    assert command.main(arguments) == code
    assert suites.log.read_text() == "good "
    assert sorted(file.name for file in out.iterdir()) == ["gpu-suite.jsonl", "report.txt"]
    assert json.loads((out / "gpu-suite.jsonl").read_text())["machine"]["commit"] == "abc"
    assert "commit abc" in (out / "report.txt").read_text() and list(work.iterdir()) == []
    assert command.main([*arguments[:-1], "gud"]) == 2


def test_without_a_gpu_there_is_nothing_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "describe_machine", lambda: MACHINE | {"gpu": None})
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    assert command.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("free_gb", "ram_gb", "in_memory"), [(60, 130, True), (30, 130, False), (60, 90, False)]
)
def test_inputs_lie_in_shared_memory_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gb: int, ram_gb: int, in_memory: bool
) -> None:
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gb * 10**9))
    ram = SimpleNamespace(available=ram_gb * 10**9)
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: ram)
    expected = tmp_path if in_memory else command.REPOSITORY / "build"
    assert command.folder_of_work(tmp_path).parent == expected


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


def test_the_tests_of_a_file_are_a_stage(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    arguments = {"file": str(tmp_path / "test_it.py"), "marks": "gpu"}
    outcome = run_piece("benchmarks.gpu_suite.test_file", arguments, timeout_seconds=120)
    figures = outcome.figures
    assert figures is not None, outcome.error
    run = figures["runs"]["pytest"]
    assert [run[f"num_{what}"] for what in ("passed", "failed", "skipped")] == [1, 2, 1]
    assert figures["printed_by_tests"] == ["x is 1", "x is 2", "x is 3"]
    names = [problem.splitlines()[0].rpartition("::")[2] for problem in figures["problems"]]
    assert names == ["test_some[3]", "test_set_up"] and "OSError: no disk" in figures["problems"][1]
