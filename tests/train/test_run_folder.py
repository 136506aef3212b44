"""Who may write into a run's folder, what a resume may change, and how metrics.jsonl is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_train.errors import RecipeError, RunFolderError
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.train.run_folder import RunFolder


def make_recipe(tmp_path: Path, **training: Any) -> Recipe:
    data = {"train": "rows.jsonl", "eval": 0.1}
    values = {"output_dir": str(tmp_path / "run"), "max_steps": 10} | training
    return Recipe.from_dict({"model": {"base": "org/base"}, "data": data, "training": values})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_free_folder_may_be_used_and_checking_creates_nothing(tmp_path: Path, folder: RunFolder) -> None:
    folder.check(make_recipe(tmp_path), resume=False)
    assert not folder.path.exists()
    folder.path.mkdir()
    folder.check(make_recipe(tmp_path), resume=False)


def test_there_must_be_something_to_resume(tmp_path: Path, folder: RunFolder) -> None:
    for _ in range(2):
        with pytest.raises(RunFolderError, match="there is no run to resume"):
            folder.check(make_recipe(tmp_path), resume=True)
        folder.path.mkdir(exist_ok=True)


def test_more_steps_and_moved_files_are_the_same_run(tmp_path: Path, folder: RunFolder) -> None:
    """What the files hold is compared by who reads them."""
    recipe = make_recipe(tmp_path)
    folder.begin(recipe)
    base = recipe.model.model_copy(update={"base": "/elsewhere/base"})
    folder.check(recipe.model_copy(update={"model": base}), resume=True)
    folder.check(make_recipe(tmp_path, max_steps=99), resume=True)
    assert folder.begun_recipe() == recipe


def test_a_runs_folder_is_its_output_folder_wherever_it_lies(tmp_path: Path, folder: RunFolder) -> None:
    folder.begin(make_recipe(tmp_path))
    assert load_recipe(folder.path).training.output_dir == str(tmp_path / "run")
    (folder.path / "metrics.jsonl").touch()
    moved = folder.path.rename(tmp_path / "moved")
    for given in (moved, moved / "recipe.yaml"):
        assert load_recipe(given).training.output_dir == str(moved)
    assert load_recipe(moved, ["training.output_dir=x"]).training.output_dir == "x"


@pytest.mark.parametrize("root", ["/", "/tmp/..", "//"])
def test_the_root_is_no_run_folder(tmp_path: Path, root: str) -> None:
    with pytest.raises(RecipeError, match="output_dir: is the root of the file system"):
        make_recipe(tmp_path, output_dir=root)
    home = make_recipe(tmp_path, output_dir="~/runs").training.output_dir
    assert home == str(Path.home() / "runs")


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, folder: RunFolder, resume: bool) -> None:
    folder.path.mkdir()
    (folder.path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not empty and is not a run"):
        folder.check(make_recipe(tmp_path), resume=resume)


@pytest.mark.parametrize("resume", [False])
def test_a_run_killed_before_its_recipe_was_there_leaves_the_folder_free(
    tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    def kill(self: Path, target: Path) -> None:
        raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "replace", kill)
        folder.begin(make_recipe(tmp_path))
    assert not folder.recipe_file.exists() and any(folder.path.iterdir())
    folder.check(make_recipe(tmp_path), resume=resume)
    folder.begin(make_recipe(tmp_path))
    assert [path.name for path in folder.path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("below", ["", "deep/down"])
def test_a_folder_below_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "notes").write_text("a file")
    folder = RunFolder(tmp_path / "notes" / below / "run")
    with pytest.raises(RunFolderError, match=r"notes is a file.*training\.output_dir"):
        folder.check(make_recipe(tmp_path), resume=False)


def test_another_runs_folder_needs_resume(tmp_path: Path, folder: RunFolder) -> None:
    recipe = make_recipe(tmp_path)
    folder.begin(recipe)
    with pytest.raises(RunFolderError, match="holds a run already.*--resume"):
        folder.check(recipe, resume=False)
    folder.check(recipe, resume=True)


def test_a_resume_names_every_changed_key(tmp_path: Path, folder: RunFolder) -> None:
    folder.begin(make_recipe(tmp_path))
    changed = make_recipe(tmp_path, learning_rate=1e-3, seed=4, log_every=5)
    with pytest.raises(RunFolderError, match=r"differ: training\.seed, training\.learning_rate\."):
        folder.check(changed, resume=True)


def test_keys_that_do_not_touch_the_computation_may_change(tmp_path: Path, folder: RunFolder) -> None:
    folder.begin(make_recipe(tmp_path))
    changes = {
        "log_every": 3,
        "eval_every": 2,
        "save_every": 1,
        "keep_checkpoints": 5,
        "report_to": ["wandb"],
    }
    folder.check(make_recipe(tmp_path, **changes), resume=True)
    moved = RunFolder(folder.path.rename(tmp_path / "moved"))
    moved.check(make_recipe(tmp_path, output_dir=str(moved.path)), resume=True)


def test_metrics_newer_than_the_checkpoint_are_cut(folder: RunFolder) -> None:
    folder.path.mkdir()
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 9.0}]
    rows += [{"step": step, "loss": 10.0 / step} for step in range(1, 6)]
    rows.insert(4, {"step": 3, "eval_loss": 5.0})
    for row in rows:
        folder.append_metrics(row)
    folder.cut_metrics(3)
    assert [json.loads(line) for line in folder.metrics_file.read_text().splitlines()] == rows[:5]
    assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("last_line", ['{"step": 3, "lo', "{", '{"step": 3, "loss": 2.5}'])
def test_a_last_line_cut_by_a_crash_does_not_spoil_what_follows(folder: RunFolder, last_line: str) -> None:
    folder.path.mkdir()
    for step in (1, 2):
        folder.append_metrics({"step": step})
    with folder.metrics_file.open("a") as file:
        file.write(last_line)  # no end of line
    folder.cut_metrics(2)
    folder.append_metrics({"step": 3})
    steps = [json.loads(line)["step"] for line in folder.metrics_file.read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_there_may_be_no_metrics_to_cut(folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.cut_metrics(0)
    assert not any(folder.path.iterdir())


def test_a_crash_while_the_recipe_is_written_keeps_the_one_before(
    tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.begin(make_recipe(tmp_path))
    before = folder.recipe_file.read_text()

    def crash(self: Path, target: Path) -> None:
        raise SystemExit("power cut")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "replace", crash)
        folder.begin(make_recipe(tmp_path, log_every=7))
    assert folder.recipe_file.read_text() == before
