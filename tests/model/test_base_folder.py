"""Folders that are another model than they seem are refused, by plan and train with the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import recipe_values, reversal_rows, write_base, write_recipe, write_rows

from qlora_train.cli import main
from qlora_train.errors import BaseModelError
from qlora_train.model.base_folder import check_base


def change_config(base: Path, **changes: Any) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_adapter(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}")


def pruned(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("../../blobs/gone")


def merged(base: Path) -> None:
    change_config(base, qlora_train={"merged_onto": "dequantized", "quantization": "nf4"})


def adapter_only(base: Path) -> None:
    with_adapter(base)
    (base / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_adapter, "holds an adapter beside the base"),
        (adapter_only, "is an adapter, not a base model"),
        (pruned, "a link to a file that is no longer there"),
        (merged, "Quantizing them again would round most of the adapter away"),
    ],
)
def test_plan_and_train_refuse_alike(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Any,
    message: str,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    base = write_base(tmp_path / "base")
    spoil(base)
    rows = write_rows(tmp_path / "rows.jsonl", reversal_rows(4))
    values = recipe_values(base, rows, tmp_path / "run")
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    refusals = []
    capsys.readouterr()
    for command in ("plan", "train"):
        assert main([command, str(recipe)]) == 2
        refusals.append(capsys.readouterr().err)
    assert message in refusals[0] and refusals[0] == refusals[1]
    assert not (tmp_path / "run").exists()


def test_merged_folders_may_stay_unquantized(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    merged(base)
    check_base(base)
    with pytest.raises(BaseModelError, match="export the run again with --base original"):
        check_base(base, "int8")
