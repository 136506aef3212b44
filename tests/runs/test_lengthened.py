"""Runs that are made longer, moved, stopped and asked for a checkpoint; fp16 from the first step."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_model, tiny_config
from tiny_runs import (
    adapter_bytes,
    byte_tokenizer,
    losses_of,
    metrics_of,
    recipe_values,
    reversal_rows,
    write_base,
    write_recipe,
    write_rows,
)

from qlora_train.adapter.adapter_files import load_adapter
from qlora_train.adapter.run_adapter import find_adapter
from qlora_train.adapter.trained_on import progress_of
from qlora_train.cli import main
from qlora_train.errors import RunFolderError, UnsupportedModelError
from qlora_train.plan import request
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.train import loop as loop_module
from qlora_train.train import train
from qlora_train.train.checkpoint import list_checkpoints
from qlora_train.train.schedule import learning_rate


def test_a_finished_run_goes_on_and_its_schedule_is_said(
    tmp_path: Path, base: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(Recipe.from_dict(recipe_values(base, train_file, run, training={"max_steps": 3})))
    moved = run.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["train", str(moved), "--resume", "training.max_steps=5"]) == 0
    said = capsys.readouterr().out
    rate = learning_rate(4, 5, 5e-3, 0.03, "cosine")
    assert (
        f"5 steps instead of 3: the cosine schedule now spans all 5 and goes on at step 4 with a learning "
        f"rate of {rate:.3g}" in said
    )
    assert [row["step"] for row in metrics_of(moved)] == [1, 2, 3, 4, 5]
    assert metrics_of(moved)[3]["learning_rate"] == rate
    assert load_recipe(moved).training.max_steps == 5 and not run.exists()
    assert progress_of(moved / "adapter") == (5, 5)
    with pytest.raises(RunFolderError, match="has trained 5 steps already, the recipe asks for 4"):
        train(load_recipe(moved, ["training.max_steps=4"]), resume=True)


def test_rows_that_a_last_step_did_not_fill_are_counted(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", reversal_rows(6))
    data = {"packing": False}
    values = recipe_values(base, rows, tmp_path / "run", data=data, training={"epochs": 1})
    train(Recipe.from_dict(values))
    capsys.readouterr()
    train(load_recipe(tmp_path / "run", ["training.epochs=2"]), resume=True)
    assert (
        "step 2 was not full, so 2 bins of the epoch that begins now are left out" in capsys.readouterr().out
    )


def test_a_stopped_run_leaves_an_adapter_and_says_what_it_does(
    tmp_path: Path,
    base: Path,
    train_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A hangup is a stop, too; the step in hand is finished."""
    one_step = loop_module.TrainLoop._one_step
    for number in (signal.SIGINT, signal.SIGHUP):
        run = tmp_path / str(int(number))
        recipe = write_recipe(
            tmp_path / "r.yaml", recipe_values(base, train_file, run, training={"max_steps": 9})
        )

        def interrupted(loop: Any, step: int, number: int = number) -> Any:
            if step == 3:
                os.kill(os.getpid(), number)
            return one_step(loop, step)

        monkeypatch.setattr(loop_module.TrainLoop, "_one_step", interrupted)
        assert main(["train", str(recipe)]) == 128 + number
        said = capfd.readouterr().err
        if number == signal.SIGINT:
            assert "stopping: step 3 is being finished, about " in said
        assert list_checkpoints(run / "checkpoints") == [3]
        assert progress_of(run / "adapter") == (3, 9)
        _, saved = load_adapter(run / "checkpoints" / "step-3" / "adapter")
        _, left = load_adapter(run / "adapter")
        assert all(torch.equal(saved[name][1], left[name][1]) for name in left)
        heard: list[str] = []
        assert find_adapter(run, None, heard.append) == run / "adapter"
        assert heard == ["the adapter of step 3 of 9"]


def test_it_saves_by_the_clock(
    tmp_path: Path, base: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_values(base, train_file, tmp_path / "run", training={"max_steps": 3})
    assert Recipe.from_dict(values).training.save_every == "auto"
    train(Recipe.from_dict(values))
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [3]
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0.0)
    values["training"] |= {"output_dir": str(tmp_path / "b"), "keep_checkpoints": 9}
    train(Recipe.from_dict(values))
    assert list_checkpoints(tmp_path / "b" / "checkpoints") == [1, 2, 3]
    assert adapter_bytes(tmp_path / "b") == adapter_bytes(tmp_path / "run")


def gemma_with_large_activations(folder: Path) -> Path:
    random_model(tiny_config("gemma3_text", vocab_size=259)).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    large = {n: torch.full_like(t, 3e4) for n, t in tensors.items() if "post_feedforward_layernorm" in n}
    save_file(tensors | large, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_fp16_is_refused_before_it_begins_where_the_base_leaves_its_range(
    tmp_path: Path, train_file: Path
) -> None:
    base = gemma_with_large_activations(tmp_path / "base")
    values = recipe_values(base, train_file, tmp_path / "run", training={"max_steps": 1})
    values["model"]["compute_dtype"] = "float16"
    with pytest.raises(
        UnsupportedModelError, match="output of decoder layer 0 leaves its range.*gemma3_text"
    ):
        train(Recipe.from_dict(values))
    assert not (tmp_path / "run").exists()


def test_fp16_learns_as_bf16_does(tmp_path: Path, base: Path, train_file: Path) -> None:
    """Within 1 % after every epoch's worth of steps; no step is lost."""
    ends = []
    for name in ("float16", "bfloat16"):
        values = recipe_values(base, train_file, tmp_path / name, training={"max_steps": 24})
        values["model"]["compute_dtype"] = name
        train(Recipe.from_dict(values))
        ends.append(sum(losses_of(tmp_path / name)[-8:]) / 8)
    assert all(row["applied"] for row in metrics_of(tmp_path / "float16"))
    assert ends[0] == pytest.approx(ends[1], rel=0.01)


def test_positions_beyond_the_models_are_said(
    tmp_path: Path, train_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "find_card", lambda: None)
    base = write_base(tmp_path / "base", max_position_embeddings=16)
    values = recipe_values(base, train_file, tmp_path / "run", training={"max_steps": 1})
    recipe = write_recipe(tmp_path / "r.yaml", values)
    for command in ("plan", "train"):
        assert main([command, str(recipe)]) == 0
        assert "sequence_length 32 is beyond the 16 positions" in capsys.readouterr().out
    config = json.loads((base / "config.json").read_text())
    assert config["max_position_embeddings"] == 16
