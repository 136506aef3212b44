"""plan.json of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_train.errors import RunFolderError
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.train.plan_log import PlanLog
from qlora_train.weights.execution_plan import everything_resident


@pytest.mark.parametrize("other", [None, 1, 99])
def test_a_run_of_another_format_is_refused_by_name(tmp_path: Path, other: int | None) -> None:
    file, plan = tmp_path / "plan.json", everything_resident(2)
    PlanLog(file, tmp_path).begin({"fits": True}, plan)
    assert PlanLog(file, tmp_path).read() == plan
    content = {key: value for key, value in unseal(file).items() if key != "run_format"}
    file.write_text(seal(content | ({} if other is None else {"run_format": other})), encoding="utf-8")
    with pytest.raises(RunFolderError, match=rf"run format {other or 1}.*lora\.init_from"):
        PlanLog(file, tmp_path).read()
