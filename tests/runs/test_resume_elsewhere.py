"""A resume keeps the plan of its run where it can; elsewhere it plans anew, says so, and goes on with its
data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    adapter_bytes,
    adapter_tensors,
    metrics_of,
    recipe_values,
    write_recipe,
)
from warm_processes import run_in_ranks

from qlora_train.cli import main
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.train import train
from qlora_train.train.checkpoint import list_checkpoints

AUTO = {"micro_batch_size": "auto", "gradient_accumulation_steps": None}
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1},
    "training": AUTO | {"batch_size": 6, "max_steps": 6, "save_every": 3, "optimizer": "adamw"},
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, base: Path, train_file: Path) -> Path:
    """A run of six steps, all on one machine."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(Recipe.from_dict(recipe_values(base, train_file, run, **SECTIONS)))
    return run


def stopped_copy(straight: Path, folder: Path) -> Path:
    """The run as it was after its third step."""
    run = shutil.copytree(straight, folder / "run")
    assert list_checkpoints(run / "checkpoints") == [3, 6]
    shutil.rmtree(run / "checkpoints" / "step-6")
    shutil.rmtree(run / "adapter")
    return run


def require_the_same_training(run: Path, straight: Path) -> None:
    """The same rows in every step, and the same factors up to the order of sums."""
    rows, expected_rows = metrics_of(run), metrics_of(straight)
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, expected in zip(rows, expected_rows, strict=True):
        for key in ("num_tokens", "num_supervised_tokens", "learning_rate"):
            assert row[key] == expected[key]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    lora, expected_factors = adapter_tensors(run), adapter_tensors(straight)
    for name, factor in lora.items():
        assert (factor - expected_factors[name]).norm() <= 1e-5 * expected_factors[name].norm(), name


def test_the_split_is_the_plans_and_the_recipe_keeps_what_was_said(straight: Path) -> None:
    saved = load_recipe(straight / "recipe.yaml").training
    assert (saved.batch_size, saved.micro_batch_size, saved.gradient_accumulation_steps) == (6, "auto", None)
    plan = json.loads((straight / "plan.json").read_text())
    assert plan["micro_batch_size"] * plan["num_micro_batches"] == 6
    assert plan["split"] == {"micro_batch_size": 6, "num_micro_batches": 1}


def test_on_the_same_machine_the_bytes_are_those_of_the_straight_run(straight: Path, tmp_path: Path) -> None:
    run = stopped_copy(straight, tmp_path)
    before = json.loads((run / "plan.json").read_text())["changes"]
    train(load_recipe(run), resume=True)
    assert adapter_bytes(run) == adapter_bytes(straight) and metrics_of(run) == metrics_of(straight)
    assert json.loads((run / "plan.json").read_text())["changes"] == before == []


@pytest.mark.parametrize(
    ("changes", "reason", "split"),
    [
        (["training.micro_batch_size=2"], "training.micro_batch_size=2 instead of auto", (2, 3)),
        (["memory.activations=recompute"], "memory.activations=recompute instead of auto", (6, 1)),
        (["memory.weights=disk", "memory.vram=200MiB"], "memory.vram=200MiB instead of auto", (6, 1)),
    ],
    ids=["split", "activations", "disk"],
)
def test_elsewhere_it_is_planned_anew_and_said(
    straight: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    reason: str,
    split: tuple[int, int],
) -> None:
    run = stopped_copy(straight, tmp_path)
    train(load_recipe(run, changes), resume=True)
    told = capsys.readouterr().out
    assert "planned anew from step 4 on (" in told and reason in told
    plan = json.loads((run / "plan.json").read_text())
    (change,) = plan["changes"]
    assert change["from_step"] == 4 and reason in change["reason"]
    assert tuple(change["split"].values()) == split == (plan["micro_batch_size"], plan["num_micro_batches"])
    assert [row["plan"] for row in metrics_of(run)] == [0, 0, 0, 1, 1, 1]
    require_the_same_training(run, straight)

    moved = adapter_bytes(run)  # and again, after a kill: the new plan is kept
    shutil.rmtree(run / "checkpoints" / "step-6")
    shutil.rmtree(run / "adapter")
    train(load_recipe(run), resume=True)
    assert "planned anew" not in capsys.readouterr().out
    assert adapter_bytes(run) == moved
    assert json.loads((run / "plan.json").read_text())["changes"] == plan["changes"]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("num_processes", [2, 4])
def test_another_number_of_processes_goes_on_with_the_same_rows(
    straight: Path, tmp_path: Path, num_processes: int
) -> None:
    """Six rows a step: three in each of two; of four, two take no more than one. (torchrun itself starts the
    runs of test_two_processes.py.)"""
    run = stopped_copy(straight, tmp_path)
    done = run_in_ranks(["train", str(run), "--resume"], tmp_path, num_processes)
    assert done.code == 0, done.said
    assert f"planned anew from step 4 on (processes: {num_processes} instead of 1)" in done.said
    require_the_same_training(run, straight)


def test_two_numbers_that_do_not_agree_with_the_launch_are_refused(
    base: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe_values(base, train_file, tmp_path / "run")
    values["training"] |= {"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert main(["train", str(recipe)]) == 2
    assert "2 x 2 x 1 = 4" in capsys.readouterr().err
