"""What a run says about its data, and that it takes the data that `preview` takes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import adapter_bytes, metrics_of, recipe_values, reversal_rows, write_recipe, write_rows

from qlora_train.cli import main
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.train import train

CHAT = [
    {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"{-n}"}]}
    for n in range(5)
]


def values_of(base: Path, source: Any, output_dir: Path, **data: Any) -> dict[str, Any]:
    values = recipe_values(base, Path(), output_dir, training={"max_steps": 2})
    values["data"] |= {"train": source, **data}
    return values


def test_sources_of_several_formats_train_and_generate(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = write_rows(tmp_path / "chat.jsonl", CHAT)
    pairs = write_rows(tmp_path / "pairs.jsonl", reversal_rows(6))
    values = values_of(base, [str(chat), str(pairs)], tmp_path / "run")
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    assert main(["preview", recipe]) == 0
    assert main(["train", recipe]) == 0
    assert load_recipe(tmp_path / "run").data.format == "auto"
    assert main(["train", recipe, "--resume"]) == 0
    assert main(["generate", str(tmp_path / "run"), "--prompt", "3", "--max-new-tokens", "3"]) == 0
    assert "11 rows -> 11 documents" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["preview", "train"])
def test_a_source_that_is_not_there_is_said_to_be_that_and_no_more(
    tmp_path: Path, base: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = values_of(base, "nosuch.jsonl", tmp_path / "run")
    assert main([command, str(write_recipe(tmp_path / "recipe.yaml", values))]) == 2
    message = capsys.readouterr().err.partition("qlora-train: ")[2]
    assert re.fullmatch(r"The data file nosuch\.jsonl does not exist \(looked in [^\n]*\)\.\n", message)


def test_the_evaluation_data_is_reported_too(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = reversal_rows(12)
    long = {"prompt": "a" * 40, "completion": "b"}
    source = write_rows(tmp_path / "train.jsonl", rows)
    evaluation = write_rows(tmp_path / "eval.jsonl", [*rows[:3], long])
    train(Recipe.from_dict(values_of(base, str(source), tmp_path / "run", eval=str(evaluation))))
    lines = capsys.readouterr().out.splitlines()
    said = [line.removeprefix("evaluation: ") for line in lines if line.startswith("evaluation: ")]
    assert said[0].startswith("4 rows -> 4 documents")
    assert any(line.startswith("1 rows longer than sequence_length") for line in said)
    assert "3 evaluation rows are also training rows, word for word" in said


def test_an_output_folder_below_a_file_is_one_message(
    tmp_path: Path, base: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe_values(base, train_file, train_file / "run")
    assert main(["train", str(write_recipe(tmp_path / "recipe.yaml", values))]) == 2
    assert f"{train_file} is a file" in capsys.readouterr().err


def test_lora_plus_in_8_bits_saves_and_resumes(tmp_path: Path, base: Path, train_file: Path) -> None:
    """Large enough factors for 8-bit state in both groups."""
    changes: dict[str, dict[str, Any]] = {
        "lora": {"rank": 32},
        "training": {"max_steps": 4, "save_every": 2, "keep_checkpoints": 2, "lora_b_lr_ratio": 4.0},
    }
    values = recipe_values(base, train_file, tmp_path / "straight", **changes)
    train(Recipe.from_dict(values))
    straight = tmp_path / "straight"
    state = load_file(straight / "checkpoints" / "step-2" / "state.safetensors")
    assert state["optimizer.0.state1"].dtype == state["optimizer.1.state1"].dtype == torch.uint8

    before = adapter_bytes(straight), metrics_of(straight)
    shutil.rmtree(straight / "checkpoints" / "step-4")
    train(Recipe.from_dict(values), resume=True)
    assert (adapter_bytes(straight), metrics_of(straight)) == before
