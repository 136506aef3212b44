"""Bases whose config, tokenizer or weights are damaged in whatever way: one message, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import recipe_values, write_recipe

from qlora_train.cli import main

DEEP = '{"a":' * 10**5


@pytest.fixture
def spoilt(tmp_path: Path, base: Path) -> Path:
    """A base that a test may spoil."""
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture
def run(
    tmp_path: Path, spoilt: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`train` (or another command) on the spoilt base; returns its one message."""

    def run(command: str = "train") -> str:
        run_dir = tmp_path / "run"
        values = recipe_values(spoilt, train_file, run_dir, training={"max_steps": 1})
        recipe = write_recipe(tmp_path / "r.yaml", values)
        capsys.readouterr()
        assert main([command, str(recipe)]) == 2
        text = capsys.readouterr().err
        before, ours, message = text.rpartition("qlora-train: ")
        assert ours and "Traceback" not in text and len(message) < 2000, text
        assert not run_dir.exists()
        return message

    return run


CONTENTS: dict[str, str | bytes] = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "an empty object": "{}",
    "cut": '{"model_type": "lla',
    "deep": DEEP,
    "zeros": bytes(300),
    "not UTF-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_something_else(
    spoilt: Path, run: Callable[..., str], name: str, content: str | bytes
) -> None:
    (spoilt / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(spoilt) in run()
    if name == "config.json":
        assert "config.json" in run("plan")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "dangling"])
def test_what_is_no_file(spoilt: Path, run: Callable[..., str], name: str, kind: str) -> None:
    file = spoilt / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(file if kind == "loop" else "../blobs/gone")
    assert str(spoilt) in run()


ODD_VALUES: dict[str, Any] = {
    "no layers": {"num_hidden_layers": 0},
    "a million layers": {"num_hidden_layers": 10**6},
    "layers as text": {"num_hidden_layers": "2"},
    "no width": {"hidden_size": 0},
    "an odd width": {"hidden_size": 63},
    "heads that do not divide": {"num_attention_heads": 3},
    "no heads": {"num_attention_heads": 0},
    "no key heads": {"num_key_value_heads": 0},
    "no head width": {"head_dim": 0},
    "a huge vocabulary": {"vocab_size": 10**12},
    "an epsilon that is text": {"rms_norm_eps": "x"},
    "an activation that is none": {"hidden_act": "nope"},
    "an activation that is a number": {"hidden_act": 5},
    "rope that is a number": {"rope_parameters": 5, "rope_scaling": 5},
    "rope of an unknown kind": {"rope_parameters": {"rope_type": "x"}},
    "tied as text": {"tie_word_embeddings": "x"},
    "a family that is a number": {"model_type": 5},
    "a family that is none": {"model_type": "nope"},
    "layer kinds that are a number": {"layer_types": 5},
}


@pytest.mark.parametrize("changes", ODD_VALUES.values(), ids=ODD_VALUES.keys())
def test_a_config_with_odd_values(spoilt: Path, run: Callable[..., str], changes: dict[str, Any]) -> None:
    file = spoilt / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    run()


def of_another_kind(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["type"] = "Foo"


def without_a_model(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"] = None


def with_negative_ids(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"] = {k: -v for k, v in tokenizer["model"]["vocab"].items()}


def with_odd_merges(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"] = ["a"]


def with_a_pattern_that_is_none(tokenizer: dict[str, Any]) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = pattern


def with_a_normalizer_that_panics(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}


def with_an_odd_decoder(tokenizer: dict[str, Any]) -> None:
    tokenizer["decoder"] = {"type": "X"}


def with_an_added_token_that_is_a_number(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"] = [5]


@pytest.mark.parametrize(
    "spoil",
    [
        of_another_kind,
        without_a_model,
        with_negative_ids,
        with_odd_merges,
        with_a_pattern_that_is_none,
        with_a_normalizer_that_panics,
        with_an_odd_decoder,
        with_an_added_token_that_is_a_number,
    ],
)
def test_a_damaged_tokenizer(
    spoilt: Path, run: Callable[..., str], spoil: Callable[[dict[str, Any]], None]
) -> None:
    file = spoilt / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    spoil(tokenizer)
    file.write_text(json.dumps(tokenizer))
    for command in ("train", "preview"):
        message = run(command)
        assert "the tokenizer of" in message and str(spoilt) in message


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": 5},
        {"eos_token": 5},
        {"eos_token": {"content": 5}},
        {"model_max_length": "x"},
        {"added_tokens_decoder": {"x": 5}},
        {"extra_special_tokens": 5},
        {"auto_map": 5},
        {"__class__": "x"},
    ],
    ids=str,
)
def test_an_odd_tokenizer_config(spoilt: Path, run: Callable[..., str], changes: dict[str, Any]) -> None:
    file = spoilt / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert "the tokenizer of" in run()


NAME = "model.layers.0.mlp.up_proj.weight"


def with_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The weights with another header; what `change` returns, if anything, is its text."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    raw = (change(header) or json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an infinite shape": lambda header: header[NAME].update(shape=[float("inf"), 3]),
    "a shape that is text": lambda header: header[NAME].update(shape="12"),
    "a huge shape": lambda header: header[NAME].update(shape=[2**62, 2**62]),
    "an infinite offset": lambda header: header[NAME].update(data_offsets=[0, float("inf")]),
    "a negative offset": lambda header: header[NAME].update(data_offsets=[-8, 0]),
    "a dtype that is a list": lambda header: header[NAME].update(dtype=["F16"]),
    "an unknown dtype": lambda header: header[NAME].update(dtype="F4"),
    "an entry that is null": lambda header: header.update({NAME: None}),
    "a list": lambda header: "[]",
    "deep": lambda header: DEEP,
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS.keys())
def test_a_damaged_header(
    spoilt: Path, run: Callable[..., str], change: Callable[[dict[str, Any]], Any]
) -> None:
    with_header(spoilt / "model.safetensors", change)
    assert "model.safetensors" in run()


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [{}]}', DEEP], ids=repr
)
def test_a_damaged_generation_config(spoilt: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (spoilt / "generation_config.json").write_text(content)
    capsys.readouterr()
    assert main(["generate", str(spoilt), "--prompt", "x", "--max-new-tokens", "1"]) == 2
    assert "generation_config.json" in capsys.readouterr().err


def test_the_whole_base_trains(tmp_path: Path, spoilt: Path, train_file: Path) -> None:
    values = recipe_values(spoilt, train_file, tmp_path / "run", training={"max_steps": 1})
    assert main(["train", str(write_recipe(tmp_path / "r.yaml", values))]) == 0
