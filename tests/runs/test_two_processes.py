"""Two processes with one micro-batch each are one process with two: the same sum over supervised tokens."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    adapter_bytes,
    adapter_tensors,
    child_environment,
    metrics_of,
    recipe_values,
    reversal_rows,
    write_recipe,
    write_rows,
)
from warm_processes import run_in_ranks

from qlora_train.recipe import Recipe
from qlora_train.train import train
from qlora_train.train.checkpoint import list_checkpoints

SECTIONS = {
    "lora": {"dropout": 0.1},
    "data": {"eval": 0.2, "packing": False},
    "training": {"max_steps": None, "epochs": 1.4, "eval_every": 4, "optimizer": "adamw", "save_every": 3},
}


def run_in_a_child(command: list[str]) -> None:
    environment = child_environment(GLOO_SOCKET_IFNAME="lo")
    if not torch.accelerator.is_available():
        del environment["ACCELERATE_USE_CPU"]  # torchrun's processes find each other without it
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_are_two_micro_batches_and_resume_to_the_same_bytes(
    tmp_path: Path, base: Path, train_file: Path
) -> None:
    alone = recipe_values(base, train_file, tmp_path / "alone", **SECTIONS)
    train(Recipe.from_dict(alone))
    together = recipe_values(base, train_file, tmp_path / "together", **SECTIONS)
    together["training"]["gradient_accumulation_steps"] = 1
    recipe = write_recipe(tmp_path / "recipe.yaml", together)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "qlora_train", "train", str(recipe)]
    run_in_a_child(command)

    rows, expected_rows = metrics_of(tmp_path / "together"), metrics_of(tmp_path / "alone")
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, expected in zip(rows, expected_rows, strict=True):
        for key in expected.keys() - {"num_tokens"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-5), (row["step"], key)
    adapter, expected_adapter = adapter_tensors(tmp_path / "together"), adapter_tensors(tmp_path / "alone")
    assert adapter.keys() == expected_adapter.keys()
    for name, factor in adapter.items():
        difference = (factor - expected_adapter[name]).norm() / expected_adapter[name].norm()
        assert difference <= 1e-6, name

    straight = adapter_bytes(tmp_path / "together")
    last = list_checkpoints(tmp_path / "together" / "checkpoints")[-1]
    shutil.rmtree(tmp_path / "together" / "checkpoints" / f"step-{last}")
    shutil.rmtree(tmp_path / "together" / "adapter")
    resumed = run_in_ranks(["train", str(recipe), "--resume"], tmp_path, 2)
    assert resumed.code == 0, resumed.said
    assert adapter_bytes(tmp_path / "together") == straight
    assert metrics_of(tmp_path / "together") == rows


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_processes_that_read_other_data_are_refused(tmp_path: Path, base: Path) -> None:
    """As on two machines with files of their own at the same place."""
    files = [write_rows(tmp_path / str(rank) / "rows.jsonl", reversal_rows(28, rank)) for rank in range(2)]
    recipe = write_recipe(
        tmp_path / "recipe.yaml", recipe_values(base, files[0], tmp_path / "run", **SECTIONS)
    )
    own = [[f"data.train={file}"] for file in files]
    ended = run_in_ranks(["train", str(recipe)], tmp_path, 2, own)
    assert ended.code == 2 and not (tmp_path / "run" / "recipe.yaml").exists()
    assert ended.said.count("process 1: the training data, the evaluation data. Give every machine") == 2
