"""Which adapter of a run is meant by --checkpoint, and by nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_train.adapter.run_adapter import find_adapter
from qlora_train.errors import RunFolderError
from qlora_train.files.sealed_json import seal


def write_adapter(folder: Path, step: int, num_steps: int = 9) -> None:
    folder.mkdir(parents=True)
    (folder / "trained_on.json").write_text(json.dumps({"step": step, "num_steps": num_steps}))


def write_checkpoint(run: Path, step: int, best: int | None) -> None:
    write_adapter(run / "checkpoints" / f"step-{step}" / "adapter", step)
    (run / "checkpoints" / f"step-{step}" / "state.json").write_text(seal({"best_step": best}))


def found(run: Path, checkpoint: str | None) -> tuple[str, list[str]]:
    said: list[str] = []
    return str(find_adapter(run, checkpoint, said.append).relative_to(run)), said


def test_every_way_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"recipe\.yaml is missing"):
        found(tmp_path, None)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RunFolderError, match="no adapter yet, and no checkpoint"):
        found(tmp_path, None)
    with pytest.raises(RunFolderError, match="no checkpoint that last could name"):
        found(tmp_path, "last")
    write_checkpoint(tmp_path, 3, None)
    with pytest.raises(RunFolderError, match="no evaluation gave a finite loss.*there are step-3, and last"):
        found(tmp_path, "best")
    write_checkpoint(tmp_path, 10, 3)
    assert found(tmp_path, "last")[0] == "checkpoints/step-10/adapter"
    assert found(tmp_path, "best") == ("checkpoints/step-3/adapter", ["the adapter of step 3 of 9"])
    assert found(tmp_path, "step-3")[0] == "checkpoints/step-3/adapter"
    for name in ("step-4", "newest", "step-"):
        with pytest.raises(RunFolderError, match=f"no checkpoint {name}; there are step-3, step-10"):
            found(tmp_path, name)


def test_an_unfinished_adapter_is_said(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    write_adapter(tmp_path / "adapter", 4)
    assert found(tmp_path, None) == ("adapter", ["the adapter of step 4 of 9"])
    write_adapter(tmp_path / "b" / "adapter", 9)
    (tmp_path / "b" / "recipe.yaml").touch()
    assert found(tmp_path / "b", None) == ("adapter", [])


def test_the_best_that_was_not_saved_is_said(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    write_checkpoint(tmp_path, 5, 2)
    with pytest.raises(RunFolderError, match="step 2 was the best, but was not saved; there are step-5"):
        found(tmp_path, "best")


def test_the_best_of_a_damaged_state_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    write_checkpoint(tmp_path, 5, 5)
    (tmp_path / "checkpoints" / "step-5" / "state.json").write_text('{"best_step": 4}')
    with pytest.raises(RunFolderError, match=r"state\.json: does not read.*Name a step"):
        found(tmp_path, "best")
