"""Bad input: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import recipe_values, write_base, write_recipe, write_rows

from qlora_train.cli import main
from qlora_train.recipe import Recipe
from qlora_train.train import train

MESSAGES = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]


class Bench:
    """A good recipe whose base, data and keys a test then spoils."""

    def __init__(self, folder: Path, base: Path, train_file: Path) -> None:
        self.base = Path(shutil.copytree(base, folder / "base"))
        self.train_file = Path(shutil.copyfile(train_file, folder / "rows.jsonl"))
        self.output_dir = folder / "run"
        self.values: dict[str, Any] = recipe_values(self.base, self.train_file, self.output_dir)
        self.values["training"]["max_steps"] = 1
        self._recipe = folder / "recipe.yaml"

    @property
    def weights(self) -> Path:
        return self.base / "model.safetensors"

    def train(self, *options: str) -> int:
        return main(["train", str(write_recipe(self._recipe, self.values)), *options])


@pytest.fixture
def bench(tmp_path: Path, base: Path, train_file: Path) -> Bench:
    return Bench(tmp_path, base, train_file)


def missing_data(bench: Bench) -> list[str]:
    bench.train_file.unlink()
    return ["rows.jsonl", "does not exist"]


def a_row_without_the_column(bench: Bench) -> list[str]:
    lines = bench.train_file.read_text().splitlines()
    lines[4] = json.dumps({"prompt": "abc:"})
    bench.train_file.write_text("\n".join(lines))
    return ["rows.jsonl line 5", "no column 'completion'"]


def a_mapped_column_that_is_not_there(bench: Bench) -> list[str]:
    bench.values["data"]["columns"] = {"prompt": "question"}
    return ["rows.jsonl line 1", "'question'", "prompt, completion"]


def a_line_that_is_no_json(bench: Bench) -> list[str]:
    lines = bench.train_file.read_text().splitlines()
    lines[2] = lines[2][:-4]
    bench.train_file.write_text("\n".join(lines))
    return ["rows.jsonl line 3", "not valid JSON"]


def empty_data(bench: Bench) -> list[str]:
    bench.train_file.write_text("")
    return ["rows.jsonl", "empty"]


def blank_data(bench: Bench) -> list[str]:
    bench.train_file.write_text("\n \n")
    return ["rows.jsonl", "no rows"]


def everything_masked(bench: Bench) -> list[str]:
    write_rows(bench.train_file, [{"messages": [{"role": "user", "content": "hello?"}]}] * 3)
    return ["No row of 3 can be trained on: 3 without a supervised token"]


def no_chat_template(bench: Bench) -> list[str]:
    write_rows(bench.train_file, MESSAGES)
    write_base(bench.base, chat_template=None)
    (bench.base / "chat_template.jinja").unlink(missing_ok=True)
    return ["no chat template", "prompt_completion"]


def no_such_base(bench: Bench) -> list[str]:
    shutil.rmtree(bench.base)
    return [str(bench.base)]


def no_config(bench: Bench) -> list[str]:
    (bench.base / "config.json").unlink()
    return [str(bench.base), "no config.json"]


def no_weights(bench: Bench) -> list[str]:
    bench.weights.unlink()
    return [str(bench.base), "no weights"]


def no_tokenizer(bench: Bench) -> list[str]:
    (bench.base / "tokenizer.json").unlink()
    return [str(bench.base), "no tokenizer"]


def pickled_weights_only(bench: Bench) -> list[str]:
    torch.save(load_file(bench.weights), bench.base / "pytorch_model.bin")
    bench.weights.unlink()
    return ["pytorch_model.bin", "pickle", "save_pretrained"]


def a_tensor_of_the_wrong_shape(bench: Bench) -> list[str]:
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(load_file(bench.weights) | {name: torch.zeros(112, 60)}, bench.weights)
    return [name, "[112, 60]", "[112, 64]"]


def a_norm_of_the_wrong_shape(bench: Bench) -> list[str]:
    save_file(load_file(bench.weights) | {"model.norm.weight": torch.zeros(65)}, bench.weights)
    return ["model.norm.weight", "[65]", "[64]"]


def a_tensor_too_few(bench: Bench) -> list[str]:
    tensors = load_file(bench.weights)
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, bench.weights)
    return ["no tensor model.layers.0.self_attn.o_proj.weight"]


def a_layer_too_many(bench: Bench) -> list[str]:
    file = bench.base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    return ["model.layers.1.", "config.json"]


def a_truncated_file(bench: Bench) -> list[str]:
    bench.weights.write_bytes(bench.weights.read_bytes()[:-100])
    return ["model.safetensors", "truncated"]


def shards(bench: Bench) -> Path:
    """The weights as two shards and an index; returns the second one."""
    tensors = load_file(bench.weights)
    names = sorted(tensors)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, bench.base / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = bench.base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    bench.weights.unlink()
    return bench.base / "b.safetensors"


def a_truncated_shard(bench: Bench) -> list[str]:
    shard = shards(bench)
    shard.write_bytes(shard.read_bytes()[:-100])
    return ["b.safetensors", "truncated"]


def a_missing_shard(bench: Bench) -> list[str]:
    shards(bench).unlink()
    return ["b.safetensors", "missing"]


def a_token_beyond_the_embedding(bench: Bench) -> list[str]:
    write_base(bench.base, vocab_size=200)
    lines = bench.train_file.read_text().splitlines()
    lines[3] = json.dumps({"prompt": "a b:", "completion": "ba"})  # the space is one of the last tokens
    bench.train_file.write_text("\n".join(lines))
    return ["rows.jsonl line 4", "holds the token", "has 200 rows"]


def a_target_that_matches_nothing(bench: Bench) -> list[str]:
    bench.values["lora"]["target_modules"] = ["q_proj", "query"]
    return ["lora.target_modules: query", "k_proj", "down_proj"]


def an_unknown_key(bench: Bench) -> list[str]:
    bench.values["training"]["learning_rte"] = 1e-4
    return ["recipe.yaml", "learning_rte", "learning_rate"]


SPOILERS: list[Callable[[Bench], list[str]]] = [
    missing_data,
    a_row_without_the_column,
    a_mapped_column_that_is_not_there,
    a_line_that_is_no_json,
    empty_data,
    blank_data,
    everything_masked,
    no_chat_template,
    no_such_base,
    no_config,
    no_weights,
    no_tokenizer,
    pickled_weights_only,
    a_tensor_of_the_wrong_shape,
    a_norm_of_the_wrong_shape,
    a_tensor_too_few,
    a_layer_too_many,
    a_truncated_file,
    a_truncated_shard,
    a_missing_shard,
    a_token_beyond_the_embedding,
    a_target_that_matches_nothing,
    an_unknown_key,
]


def one_message(capsys: pytest.CaptureFixture[str]) -> str:
    """What is on stderr, which must be one message of ours and nothing else."""
    text = capsys.readouterr().err
    before, ours, message = text.partition("qlora-train: ")
    assert ours and not before and "qlora-train: " not in message and "Traceback" not in text, text
    return message


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda function: function.__name__)
def test_one_message_exit_code_2_and_nothing_written(
    bench: Bench, spoil: Callable[[Bench], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = spoil(bench)
    capsys.readouterr()
    assert bench.train() == 2
    message = one_message(capsys)
    assert all(part in message for part in expected), message
    assert not bench.output_dir.exists()


def test_the_unspoilt_recipe_trains(bench: Bench) -> None:
    assert bench.train() == 0
    shards(bench)
    bench.values["training"]["output_dir"] += "-sharded"
    assert bench.train() == 0


@pytest.mark.parametrize("options", [(), ("--resume",)], ids=["train", "resume"])
def test_another_runs_folder_is_left_as_it_is(
    bench: Bench, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    train(Recipe.from_dict(bench.values))
    before = {path: path.read_bytes() for path in bench.output_dir.rglob("*") if path.is_file()}
    bench.values["training"]["seed"] = 1
    capsys.readouterr()
    assert bench.train(*options) == 2
    message = one_message(capsys)
    assert str(bench.output_dir) in message and ("training.seed" in message) == bool(options)
    assert {path: path.read_bytes() for path in bench.output_dir.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_left_as_it_is(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.output_dir.mkdir()
    (bench.output_dir / "thesis.tex").write_text("years of work")
    assert bench.train() == 2
    assert "is not a run" in one_message(capsys)
    assert [path.name for path in bench.output_dir.iterdir()] == ["thesis.tex"]


def test_a_damaged_checkpoint_is_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    train(Recipe.from_dict(bench.values))
    file = bench.output_dir / "checkpoints" / "step-1" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    capsys.readouterr()
    assert bench.train("--resume") == 2
    assert "step-1: this checkpoint does not read" in one_message(capsys)
