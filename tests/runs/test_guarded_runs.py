"""Two runs never mix, and damaged state never trains: whole runs through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import process_changes
import pytest
from safetensors.torch import load_file, save_file
from tiny_runs import adapter_bytes, child_environment, metrics_of, recipe_values, write_recipe
from warm_processes import run_command, start_command, wait_for

from qlora_train.cli import main
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.recipe import Recipe
from qlora_train.train import train
from qlora_train.walk.optimizer import FlatOptimizer


@pytest.fixture(autouse=True)
def products_in_float32() -> None:
    """Not here (see tests/conftest.py): runs in processes of their own are compared with one in this."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path, train_file: Path) -> Path:
    """A run of three steps with a checkpoint of each."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(Recipe.from_dict(values_of(base, train_file, run_dir)))
    return run_dir


def values_of(base: Path, train_file: Path, run_dir: Path, **training: Any) -> dict[str, Any]:
    changes = {"max_steps": 3, "save_every": 1, "keep_checkpoints": 3} | training
    return recipe_values(base, train_file, run_dir, training=changes)


def one_message(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("qlora-train: ") and "Traceback" not in text, text
    return text


@pytest.mark.parametrize("options", [(), ("--resume",)], ids=["train", "resume"])
def test_a_second_run_ends_with_2_while_the_first_still_reads(
    tmp_path: Path, base: Path, train_file: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    recipe = str(write_recipe(tmp_path / "r.yaml", values_of(base, train_file, run_dir)))
    holds, log = tmp_path / "holds", tmp_path / "log"
    first = start_command(["train", recipe], log, before=partial(process_changes.hold_after_the_check, holds))
    while not holds.exists():
        first.join(0.01)
        assert first.is_alive(), log.read_text()
    assert main(["train", recipe, "training.learning_rate=1e-3", *options]) == 2
    message = one_message(capsys)
    assert "another run is at work" in message and str(run_dir) in message
    assert first.pid is not None
    os.kill(first.pid, signal.SIGTERM)
    assert wait_for(first, log).code == 128 + signal.SIGTERM
    assert not run_dir.exists()


def copied(finished: Path, tmp_path: Path, last_step: int = 2) -> Path:
    """The run as it was after that step, in a folder of its own."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "adapter")
    for step in range(last_step + 1, 4):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step}")
    recipe = (run_dir / "recipe.yaml").read_text().replace(str(finished), str(run_dir))
    (run_dir / "recipe.yaml").write_text(recipe)
    return run_dir


def flip_a_bit(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "step-2" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def one_master_that_broadcasts(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "step-2" / "state.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"masters": tensors["masters"][:1].clone()}, file)


def no_optimizer_tensors(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "step-2" / "state.safetensors"
    save_file({"masters": load_file(file)["masters"]}, file)


def another_step(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "step-2" / "state.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"step": 1}))


def nested_deeply(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-2" / "state.json").write_text('{"a":' * 10**5)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, one_master_that_broadcasts, no_optimizer_tensors, another_step, nested_deeply]
)
def test_the_newest_whole_checkpoint_is_taken_and_it_is_said(
    finished: Path, tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copied(finished, tmp_path)
    damage(run_dir)
    assert main(["train", str(run_dir), "--resume"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "step-2: this checkpoint does not read" in said and "Going on from step-1 instead." in said
    assert "going on after step 1" in said
    assert adapter_bytes(run_dir) == adapter_bytes(finished) and metrics_of(run_dir) == metrics_of(finished)


def test_with_no_whole_checkpoint_nothing_is_trained(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copied(finished, tmp_path, last_step=1)
    (run_dir / "checkpoints" / "step-1" / "state.json").write_text("{}")
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert main(["train", str(run_dir), "--resume"]) == 2
    assert "No checkpoint is left" in one_message(capsys)
    assert (run_dir / "metrics.jsonl").read_bytes() == before and not (run_dir / "adapter").exists()


def flipped_digit(file: Path) -> None:
    text = file.read_text()
    assert '"loss_tokens": 512' in text
    file.write_text(text.replace('"loss_tokens": 512', '"loss_tokens": 513'))


@pytest.mark.parametrize(
    "damage",
    [
        flipped_digit,
        Path.unlink,
        lambda file: file.write_text("{}"),
        lambda file: file.write_text("[" * 10**5),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["a digit", "gone", "empty", "deep", "a folder"],
)
def test_a_damaged_plan_is_refused(
    finished: Path, tmp_path: Path, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """It says in which order sums are taken."""
    run_dir = copied(finished, tmp_path)
    damage(run_dir / "plan.json")
    assert main(["train", str(run_dir), "--resume"]) == 2
    assert "plan.json" in one_message(capsys)


def test_a_plan_is_sealed(finished: Path) -> None:
    values = unseal(finished / "plan.json")
    assert "execution" in values and seal(values) == (finished / "plan.json").read_text()


@pytest.mark.parametrize("max_steps", [1, 2, 6])
def test_factors_that_are_not_finite_are_not_written(
    tmp_path: Path,
    base: Path,
    train_file: Path,
    max_steps: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss of the last step is that of before its update: no next step would notice."""

    def too_large_a_step(self: FlatOptimizer, learning_rate: float) -> None:
        self._lora.masters.mul_(float("inf"))
        self._lora.refresh_working()

    monkeypatch.setattr(FlatOptimizer, "step", too_large_a_step)
    values = values_of(base, train_file, tmp_path / "run", max_steps=max_steps, save_every=None)
    assert main(["train", str(write_recipe(tmp_path / "r.yaml", values))]) == 1
    message = one_message(capsys)
    assert "not finite" in message and "training.weight_decay" in message
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "key", ["training.weight_decay=1e300", "training.learning_rate=1e38", "training.lora_b_lr_ratio=1e308"]
)
def test_factors_of_an_update_beyond_float32_are_refused(
    tmp_path: Path, base: Path, train_file: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", values_of(base, train_file, tmp_path / "run"))
    assert main(["train", str(recipe), key]) == 2
    assert key.partition("=")[0] in one_message(capsys)


@pytest.mark.parametrize("catches", [Exception, BaseException])
def test_sigterm_during_start_up_ends_the_run(
    tmp_path: Path, base: Path, train_file: Path, catches: type[BaseException]
) -> None:
    """Libraries catch what they try out; under a bare `except:` the first step notices."""
    recipe = write_recipe(tmp_path / "r.yaml", values_of(base, train_file, tmp_path / "run", max_steps=60))
    swallow = partial(process_changes.swallow_sigterm, catches)
    done = run_command(["train", str(recipe)], tmp_path / "log", before=swallow)
    assert done.code == 128 + signal.SIGTERM, done.said
    assert "Traceback" not in done.said
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or metrics.read_text().count('"loss"') <= 1


def test_a_folder_in_the_home_folder(
    tmp_path: Path, base: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", values_of(base, train_file, Path("~/runs/x"), max_steps=1))
    assert main(["train", str(recipe)]) == 0
    assert (tmp_path / "runs" / "x" / "adapter").is_dir() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("path", ["/", "/proc/x", "x" * 300])
def test_where_no_run_can_be_ends_with_2(
    base: Path, tmp_path: Path, train_file: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", values_of(base, train_file, Path(path)))
    assert main(["train", str(recipe)]) == 2
    assert "training.output_dir" in one_message(capsys)


def test_what_is_written_is_utf_8_whatever_the_locale(tmp_path: Path, base: Path, train_file: Path) -> None:
    values = values_of(base, train_file, Path("runs"), max_steps=1)
    values["data"] |= {"prompt_template": "Résumé 日本 {prompt}\n", "sequence_length": 128}
    recipe = write_recipe(tmp_path / "r.yaml", values)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    commands = [["train", str(recipe)], ["preview", str(recipe)], ["export", "runs"]]
    code = f"from qlora_train.cli import main\nassert [main(c) for c in {commands!r}] == [0, 0, 0]"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(**plain),
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert b"R?sum?" in done.stdout
    assert "Résumé 日本" in (tmp_path / "runs" / "recipe.yaml").read_text("utf-8")


def test_a_full_disk_ends_in_one_message(
    tmp_path: Path, base: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands in for the disk."""
    recipe = write_recipe(tmp_path / "r.yaml", values_of(base, train_file, tmp_path / "run"))
    train(Recipe.from_dict(values_of(base, train_file, tmp_path / "warm", max_steps=1)))  # its cache is there
    limit = partial(process_changes.limit_file_size, 20_000)
    done = run_command(["train", str(recipe)], tmp_path / "log", before=limit)
    assert done.code == 1 and "File too large" in done.said and "Traceback" not in done.said
    assert os.listdir(tmp_path / "run" / "checkpoints") == []
    assert main(["train", str(recipe), "--resume"]) == 0


def test_leftovers_of_a_killed_run_are_gone_after_a_resume(finished: Path, tmp_path: Path) -> None:
    run_dir = copied(finished, tmp_path)
    for name in (
        "checkpoints/step-3.partial-0a",
        "adapter.partial-0b",
        "merged.partial-0c",
        "adapter.old-0d",
    ):
        (run_dir / name).mkdir()
    assert main(["train", str(run_dir), "--resume"]) == 0
    assert not [path for path in run_dir.rglob("*") if ".partial" in path.name or ".old" in path.name]
    assert adapter_bytes(run_dir) == adapter_bytes(finished)
