"""A run that was killed or stopped and then resumed is, byte for byte, the run that went straight through."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import (
    adapter_bytes,
    metrics_of,
    recipe_values,
    write_recipe,
)
from warm_processes import Ended, SignalAfterStep, run_command

from qlora_train.cli import main
from qlora_train.errors import RunFolderError
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.train import loop, train
from qlora_train.train import loop as loop_module
from qlora_train.train.checkpoint import TrainState, list_checkpoints, save_checkpoint

Sections = dict[str, dict[str, Any]]
StraightRun = Callable[[Sections], Path]

# 17 packed bins or 28 rows, 4 a step: the second epoch begins in step 5 or after step 7
FP16: Sections = {
    "model": {"compute_dtype": "float16"},
    "lora": {"dropout": 0.1},
    "data": {"eval": 0.2},
    "training": {"epochs": 4, "save_every": 3, "eval_every": 4, "optimizer": "paged_adamw_8bit"},
}
REFERENCE: Sections = {
    "data": {"packing": False},
    "training": {"epochs": 2, "save_every": 4, "optimizer": "adamw", "kernels": "reference"},
}
DORA: Sections = {
    "model": {"compute_dtype": "bfloat16"},
    "lora": {"use_dora": True},
    "data": {"eval": 0.2},
    "training": {"epochs": 2, "save_every": 3, "eval_every": 4, "optimizer": "adamw_8bit"},
}
NEW_TOKENS: Sections = {
    "model": {"compute_dtype": "bfloat16", "add_tokens": [{"token": "ab", "special": True}, "c"]},
    "lora": {"layers_to_transform": [1]},
    "training": {"epochs": 2, "save_every": 3, "optimizer": "adamw_8bit", "lora_b_lr_ratio": 4.0},
}
PISSA: Sections = DORA | {"lora": {"init_lora_weights": "pissa_niter_2"}}
LORA_PLUS: Sections = {
    "model": {"compute_dtype": "bfloat16", "quantization": "int8"},
    "lora": {"dropout": 0.05, "lora_bias": True},
    "training": {"max_steps": 14, "optimizer": "adamw_8bit", "lora_b_lr_ratio": 4.0, "lr_schedule": "linear"},
}


@pytest.fixture(autouse=True)
def products_in_float32() -> None:
    """Not here (see tests/conftest.py): runs in processes of their own are compared with one in this."""


@pytest.fixture(scope="module")
def straight_run(base: Path, train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> StraightRun:
    """Makes the finished run of a recipe; each once. Nothing changes it, as two tests say."""
    made = dict[str, Path]()

    def run(sections: Sections) -> Path:
        key = json.dumps(sections, sort_keys=True)
        if key not in made:
            made[key] = train_straight(base, train_file, tmp_path_factory.mktemp("straight"), sections)
        return made[key]

    return run


def train_straight(base: Path, train_file: Path, folder: Path, sections: Sections) -> Path:
    train(Recipe.from_dict(recipe_values(base, train_file, folder / "straight", **sections)))
    return folder / "straight"


def write_stopped_recipe(
    base: Path, train_file: Path, tmp_path: Path, sections: Sections
) -> tuple[Path, Path]:
    """(recipe file, run folder) of the run that will be stopped."""
    run_dir = tmp_path / "stopped"
    values = recipe_values(base, train_file, run_dir, **sections)
    return write_recipe(tmp_path / "recipe.yaml", values), run_dir


def stop_at(signal_number: int, step: int, recipe: Path, run_dir: Path) -> Ended:
    stop = SignalAfterStep(signal_number, run_dir / "metrics.jsonl", step)
    return run_command(["train", str(recipe)], recipe.with_suffix(".log"), stop)


@pytest.mark.parametrize(
    ("sections", "kill_after", "resumes_after"),
    [(FP16, 8, 6), (REFERENCE, 9, 8), (DORA, 5, 3), (NEW_TOKENS, 5, 3), (PISSA, 5, 3)],
    ids=["fp16", "reference", "DoRA", "new tokens", "PiSSA"],
)
def test_killed_in_the_second_epoch(
    tmp_path: Path,
    base: Path,
    train_file: Path,
    straight_run: StraightRun,
    sections: Sections,
    kill_after: int,
    resumes_after: int,
) -> None:
    straight = straight_run(sections)
    recipe, run_dir = write_stopped_recipe(base, train_file, tmp_path, sections)
    killed = stop_at(signal.SIGKILL, kill_after, recipe, run_dir)
    assert killed.code == -signal.SIGKILL, killed.said
    assert not (run_dir / "adapter").exists()
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    num_steps = max(row["step"] for row in metrics_of(straight))
    assert resumes_after <= newest < num_steps

    assert train(load_recipe(recipe), resume=True).num_steps == num_steps
    assert adapter_bytes(run_dir) == adapter_bytes(straight)
    assert metrics_of(run_dir) == metrics_of(straight)  # each row once, and the same
    for name in ("state.json", "state.safetensors"):
        last = Path("checkpoints", f"step-{num_steps}", name)
        assert (run_dir / last).read_bytes() == (straight / last).read_bytes()


def test_the_fp16_scale_goes_on_counting(straight_run: StraightRun) -> None:
    """Guards the test above: its runs do scale, and a resume that forgot the count would end with another."""
    straight = straight_run(FP16)
    num_steps = list_checkpoints(straight / "checkpoints")[-1]
    state = json.loads((straight / "checkpoints" / f"step-{num_steps}" / "state.json").read_text())
    assert state["loss_scale"] == 2.0**13 and state["loss_scale_good_steps"] == num_steps > 6


def test_stopped_by_sigterm_the_state_is_saved(
    tmp_path: Path,
    base: Path,
    train_file: Path,
    straight_run: StraightRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = straight_run(LORA_PLUS)
    recipe, run_dir = write_stopped_recipe(base, train_file, tmp_path, LORA_PLUS)
    stopped = stop_at(signal.SIGTERM, 6, recipe, run_dir)
    assert stopped.code == 128 + signal.SIGTERM, stopped.said
    assert "--resume" in stopped.said and "Traceback" not in stopped.said
    (saved,) = list_checkpoints(run_dir / "checkpoints")  # no save_every: only what the signal saved
    assert saved >= 6 and metrics_of(run_dir)[-1]["step"] == saved
    ending = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert ending["step"] == saved and ending["checkpoint_seconds"] > 0

    capsys.readouterr()
    assert main(["train", str(recipe), "--resume"]) == 0
    assert f"going on after step {saved}" in capsys.readouterr().out
    assert adapter_bytes(run_dir) == adapter_bytes(straight)
    assert metrics_of(run_dir) == metrics_of(straight)


def test_resuming_a_finished_run_changes_nothing(straight_run: StraightRun) -> None:
    run_dir = straight_run(FP16)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    result = train(load_recipe(run_dir / "recipe.yaml"), resume=True)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert result.loss == metrics_of(run_dir)[-2]["loss"]


def crash_in_save(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, save_number: int) -> None:
    """Train until this save, counted from 1, which does not happen."""
    saves: list[int] = []

    def save(folder: Path, state: TrainState, *arguments: Any) -> None:
        saves.append(state.step)
        if len(saves) == save_number:
            raise SystemExit("power cut")
        save_checkpoint(folder, state, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop_module, "save_checkpoint", save)
        train(recipe)


def test_killed_before_the_first_checkpoint(
    tmp_path: Path,
    base: Path,
    train_file: Path,
    straight_run: StraightRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = straight_run(FP16)
    recipe, run_dir = write_stopped_recipe(base, train_file, tmp_path, FP16)

    crash_in_save(monkeypatch, load_recipe(recipe), save_number=1)
    assert [row["step"] for row in metrics_of(run_dir)] == [0, 1, 2, 3]
    train(load_recipe(recipe), resume=True)
    assert adapter_bytes(run_dir) == adapter_bytes(straight)
    assert metrics_of(run_dir) == metrics_of(straight)


def test_overflows_are_replayed(
    tmp_path: Path, base: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale starts so high that the first checkpoint holds no applied step: no optimizer state yet."""
    monkeypatch.setattr(loop, "INITIAL_SCALE", 2.0**24)
    straight = train_straight(base, train_file, tmp_path, FP16)
    recipe, run_dir = write_stopped_recipe(base, train_file, tmp_path, FP16)
    crash_in_save(monkeypatch, load_recipe(recipe), save_number=2)
    assert list_checkpoints(run_dir / "checkpoints") == [3]
    overflows = [row["step"] for row in metrics_of(straight) if row.get("overflowed")]
    assert overflows[:4] == [1, 2, 3, 4] and len(overflows) < 10
    assert [row["grad_norm"] for row in metrics_of(straight)[1:4]] == [None] * 3  # JSON has no infinity
    train(load_recipe(recipe), resume=True)
    assert adapter_bytes(run_dir) == adapter_bytes(straight)
    assert metrics_of(run_dir) == metrics_of(straight)


def test_a_changed_recipe_is_not_resumed(straight_run: StraightRun) -> None:
    run_dir = straight_run(REFERENCE)
    before = adapter_bytes(run_dir)
    changed = load_recipe(run_dir / "recipe.yaml", ["lora.alpha=9"])
    with pytest.raises(RunFolderError, match=r"these keys differ: lora\.alpha\."):
        train(changed, resume=True)
    assert adapter_bytes(run_dir) == before
