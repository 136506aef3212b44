"""Who may write into a run's folder, what a resume may change, and how metrics.jsonl is cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import child_environment

from qlora_train.errors import RecipeError, RunFolderError
from qlora_train.files.atomic_folder import atomic_folder
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


def test_a_run_of_an_older_version_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    (folder / "recipe.yaml").write_text("model: {base: b}\ndata: {train: t}\ntraining: {samples: 3}\n")
    with pytest.raises(RecipeError, match="samples(.|\n)*run: an older version of qlora_train"):
        load_recipe(folder)
    (folder / "recipe.yaml").write_text("model: {base: b}\ndata: {train: t}\n")
    with pytest.raises(RecipeError, match="steps") as refused:
        load_recipe(folder, ["training.steps=3"])
    assert "older version" not in str(refused.value)


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
    with pytest.raises(RunFolderError, match=r"notes is a file.*training\.output_dir"), folder.claimed():
        pytest.fail("claimed")


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
    folder.cut_rows(3)
    assert [json.loads(line) for line in folder.metrics_file.read_text().splitlines()] == rows[:5]
    assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("last_line", ['{"step": 3, "lo', "{", '{"step": 3, "loss": 2.5}'])
def test_a_last_line_cut_by_a_crash_does_not_spoil_what_follows(folder: RunFolder, last_line: str) -> None:
    folder.path.mkdir()
    for step in (1, 2):
        folder.append_metrics({"step": step})
    with folder.metrics_file.open("a") as file:
        file.write(last_line)  # no end of line
    folder.cut_rows(2)
    folder.append_metrics({"step": 3})
    steps = [json.loads(line)["step"] for line in folder.metrics_file.read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_there_may_be_no_metrics_to_cut(folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.cut_rows(0)
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


def test_a_claimed_folder_is_nobody_elses(folder: RunFolder) -> None:
    with folder.claimed():
        with (
            pytest.raises(RunFolderError, match=r"another run is at work.*training\.output_dir"),
            folder.claimed(),
        ):
            pytest.fail("two runs in one folder")
        assert folder.path.is_dir()
    with folder.claimed():
        pass


HOLDER = """
import sys
from pathlib import Path
from qlora_train.train.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).claimed():
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_claim_ends_with_its_process(folder: RunFolder) -> None:
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=child_environment(), text=True, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        with pytest.raises(RunFolderError, match="another run is at work"), folder.claimed():
            pytest.fail("two runs in one folder")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with folder.claimed():
        pass


def test_a_claim_leaves_no_folder_that_nothing_was_written_into(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "down" / "run")
    with pytest.raises(ValueError, match="bad data"), folder.claimed():
        assert folder.path.is_dir()
        raise ValueError("bad data")
    assert os.listdir(tmp_path) == []
    (tmp_path / "deep").mkdir()
    with folder.claimed():
        (folder.path / "recipe.yaml").write_text("x")
    assert folder.recipe_file.exists()
    with pytest.raises(ValueError, match="bad data"), RunFolder(tmp_path / "deep" / "other").claimed():
        raise ValueError("bad data")
    assert os.listdir(tmp_path / "deep") == ["down"]


def test_a_path_that_goes_up_again_stays_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / ".." / "b")
    with folder.claimed():
        (folder.path / "recipe.yaml").write_text("x")
    assert folder.recipe_file.exists()


def test_where_there_are_no_locks_it_is_said(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(9, "as NFS says for a folder")

    monkeypatch.setattr("fcntl.flock", unsupported)
    said: list[str] = []
    with folder.claimed(said.append):
        pass
    assert len(said) == 1 and "no locks" in said[0] and str(folder.path) in said[0]


@pytest.mark.parametrize("path", ["/", "/..", "//"])
def test_the_root_of_all_files_is_refused(path: str) -> None:
    with pytest.raises(RunFolderError, match="is the root of all files"), RunFolder(Path(path)).claimed():
        pytest.fail("claimed")


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "link/run", "loop", "/proc/x", "/dev/null/x"])
def test_where_no_folder_can_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RunFolderError, match=r"training\.output_dir"), RunFolder(tmp_path / name).claimed():
        pytest.fail("claimed")
    assert sorted(os.listdir(tmp_path)) == ["link", "loop"]


def test_leftovers_are_removed_when_a_run_begins(tmp_path: Path, folder: RunFolder) -> None:
    for name in ("checkpoints/step-2.partial-0a", "adapter.old-0b", "merged.partial-0c"):
        (folder.path / name).mkdir(parents=True)
    with atomic_folder(folder.path / "merged") as live:  # an export that goes on
        folder.begin(make_recipe(tmp_path))
        assert {path.name for path in folder.path.iterdir()} == {"recipe.yaml", "checkpoints", live.name}
        assert os.listdir(folder.checkpoints) == []


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "plan.json", "metrics.jsonl", "samples.jsonl"])
def test_an_odd_entry_is_found_before_training(tmp_path: Path, folder: RunFolder, name: str) -> None:
    recipe = make_recipe(tmp_path)
    folder.begin(recipe)
    path = folder.path / name
    if "." in name:
        path.mkdir()
    else:
        path.write_text("x")
    with pytest.raises(RunFolderError, match=name):
        folder.check(recipe, resume=True)


@pytest.mark.parametrize(
    "line", [b"null", b"[1]", b"{}", b'{"step": "x"}', b"\xff\xfe", b"\0\0", b'{"a":' * 10**5], ids=repr
)
def test_damaged_lines_of_the_metrics_are_left_out(folder: RunFolder, line: bytes) -> None:
    folder.path.mkdir()
    folder.append_metrics({"step": 1, "loss": 0.1})
    with folder.metrics_file.open("ab") as file:
        file.write(line + b"\n")
    folder.append_metrics({"step": 2, "loss": 1e-300})
    rows = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1e-300}]
    assert folder.metrics() == rows
    folder.cut_rows(2)
    assert [json.loads(line) for line in folder.metrics_file.read_text().splitlines()] == rows
