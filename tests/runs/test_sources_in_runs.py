"""What a run says about its data, and that it takes the data that `preview` takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
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
    said = r"The data file nosuch\.jsonl does not exist \(looked in [^\n]*\)\. Name the one to read: [^\n]*\n"
    assert re.fullmatch(said, message)


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
    assert any(line.startswith("warning: longer than sequence_length: 1 row lost") for line in said)
    assert "3 evaluation rows also in train, word for word" in said


def test_a_surplus_token_trains_until_a_row_uses_it(
    tmp_path: Path, base: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer has 260 tokens, the embedding 259 rows."""
    base = Path(shutil.copytree(base, tmp_path / "base"))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    surplus = {"id": 259, "content": "<extra>", "special": True, "single_word": False, "lstrip": False}
    tokenizer["added_tokens"].append({**surplus, "rstrip": False, "normalized": False})
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    values = recipe_values(base, train_file, tmp_path / "run", training={"max_steps": 1})
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    assert main(["preview", recipe]) == main(["train", recipe]) == 0
    values["data"]["train"] = str(
        write_rows(tmp_path / "odd.jsonl", [*reversal_rows(2), {"prompt": "a<extra>", "completion": "b"}])
    )
    values["training"]["output_dir"] = str(tmp_path / "other")
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    capsys.readouterr()
    for command in ("preview", "train"):
        assert main([command, recipe]) == 2
        message = capsys.readouterr().err
        assert re.search(
            r"odd\.jsonl line 3: it holds the token '<extra>', number 259 .* has 259 rows", message
        )
    assert not (tmp_path / "other").exists()
    values["data"]["on_bad_row"] = "skip"
    assert main(["train", str(write_recipe(tmp_path / "recipe.yaml", values))]) == 0
    assert "1 row skipped (data.on_bad_row: skip):" in capsys.readouterr().out


def test_a_pad_token_beyond_the_embedding_is_named(
    tmp_path: Path, base: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": 259}))
    values = recipe_values(base, train_file, tmp_path / "run")
    assert main(["train", str(write_recipe(tmp_path / "recipe.yaml", values))]) == 2
    assert "pad_token_id 259 has no row in the embedding, which has 259" in capsys.readouterr().err


def test_positions_beyond_those_of_the_model_are_said(
    tmp_path: Path, base: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    positions = json.loads((base / "config.json").read_text())["max_position_embeddings"]
    values = recipe_values(base, train_file, tmp_path / "run", training={"max_steps": 1})
    values["data"]["sequence_length"] = 2 * positions
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    for command in ("preview", "plan", "train"):
        assert main([command, recipe]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"is beyond the {positions:,} positions that config.json states" in said, command


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


LATIN = """
import sys
from pathlib import Path
from qlora_train.cli import main
from qlora_train.recipe import load_recipe
from qlora_train.train.run_folder import RunFolder
recipe = load_recipe(sys.argv[1])
RunFolder(Path(recipe.training.output_dir)).begin(recipe)
sys.exit(main(["preview", sys.argv[1]]))
"""


def test_files_are_utf8_and_output_goes_on_whatever_the_locale(tmp_path: Path, base: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": "caf\u00e9", "a": "\u2603"}])
    values = values_of(base, str(rows), tmp_path / "run", columns={"completion": "a"})
    values["data"]["prompt_template"] = "R\u00e9sum\u00e9: {q}\n"
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    done = subprocess.run(
        [sys.executable, "-c", LATIN, str(recipe)], env=os.environ | plain, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"R?sum?: caf?" in done.stdout
    assert load_recipe(tmp_path / "run").data.prompt_template == "R\u00e9sum\u00e9: {q}\n"
