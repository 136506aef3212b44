"""plan.json: which plan is followed from which step on, also on other machines; other formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_train.errors import RunFolderError
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.plan.split import Split
from qlora_train.train.plan_log import PlanLog, SavedPlan, Setting
from qlora_train.weights.execution_plan import ActivationPolicy, everything_resident

GIB = 2**30
HERE = Setting("RTX 4090", 24 * GIB, 64 * GIB, 1, {"memory.vram": "auto"})
THERE = replace(HERE, device="RTX 3060", device_bytes=12 * GIB)
KEEP, RECOMPUTE = (
    SavedPlan(everything_resident(2, activation=a), Split(2, 4)) for a in list(ActivationPolicy)[:2]
)
VALUES = {"fits": True}


def log(folder: Path, setting: Setting) -> PlanLog:
    return PlanLog(folder / "plan.json", folder / "checkpoints", setting)


@pytest.mark.parametrize("other", [None, 1, 99])
def test_a_run_of_another_format_is_refused_by_name(tmp_path: Path, other: int | None) -> None:
    file = tmp_path / "plan.json"
    log(tmp_path, HERE).begin(VALUES, KEEP)
    content = {key: value for key, value in unseal(file).items() if key != "run_format"}
    file.write_text(seal(content | ({} if other is None else {"run_format": other})), encoding="utf-8")
    with pytest.raises(RunFolderError, match=rf"run format {other or 1}.*lora\.init_from"):
        log(tmp_path, HERE).read()


def test_a_move_and_the_way_back(tmp_path: Path) -> None:
    first = log(tmp_path, HERE)
    assert first.read() is None and not first.moved
    first.begin(VALUES, KEEP)
    first.change(3, RECOMPUTE.execution, "out of memory")
    again = log(tmp_path, HERE)
    assert again.read() == KEEP and not again.moved
    again.begin(VALUES, KEEP, 6)
    assert again.in_force(6) == (1, RECOMPUTE.execution)

    moved = log(tmp_path, THERE)
    assert moved.read() is None
    assert moved.moved == ["RTX 3060 instead of RTX 4090", "12.00 GiB of device memory instead of 24.00 GiB"]
    moved.begin(VALUES, KEEP, 6)
    assert [moved.in_force(step)[0] for step in (2, 3, 5, 6, 9)] == [0, 1, 1, 2, 2]
    assert moved.in_force(6)[1] == KEEP.execution

    stays = log(tmp_path, THERE)
    assert stays.read() == KEEP and not stays.moved
    back = log(tmp_path, HERE)
    assert back.read() is None and back.moved[0] == "RTX 4090 instead of RTX 3060"
    back.begin(VALUES, RECOMPUTE, 8)
    assert [back.in_force(step)[0] for step in (5, 7, 8)] == [1, 2, 3]


def test_after_a_damaged_checkpoint_the_newer_plan_begins_earlier(tmp_path: Path) -> None:
    first = log(tmp_path, HERE)
    first.begin(VALUES, KEEP)
    first.change(5, RECOMPUTE.execution, "out of memory")
    moved = log(tmp_path, THERE)
    moved.read()
    moved.begin(VALUES, RECOMPUTE, 9)
    moved.change(11, KEEP.execution, "out of memory")
    back = log(tmp_path, THERE)
    assert back.read() == RECOMPUTE
    back.begin(VALUES, RECOMPUTE, 4)
    assert [back.in_force(step) for step in (3, 4, 11)] == [
        (0, KEEP.execution),
        (1, RECOMPUTE.execution),
        (2, KEEP.execution),
    ]


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({}, []),
        ({"ram_bytes": 63 * GIB}, []),  # as systems report it
        ({"ram_bytes": 32 * GIB}, ["32.00 GiB of RAM instead of 64.00 GiB"]),
        ({"num_ranks": 2}, ["processes: 2 instead of 1"]),
        ({"memory": {"memory.vram": "8GiB"}}, ["memory.vram=8GiB instead of auto"]),
    ],
)
def test_what_counts_as_another_setting(changes: dict[str, object], differences: list[str]) -> None:
    assert replace(HERE, **changes).differences(HERE) == differences  # type: ignore[arg-type]
