"""Shapes: the torch-free sizes are those of the real skeleton, and known names are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_config

from qlora_train.errors import UserError
from qlora_train.memory.plan.model_shape import (
    KNOWN,
    find_shape,
    known_shape,
    shape_from_config,
)
from qlora_train.memory.plan.packed_sizes import PackingSizes
from qlora_train.model.base import Skeleton
from qlora_train.model.quantize import Packing

PACKINGS = [Packing("nf4"), Packing("nf4", True), Packing("fp4", True), Packing("int8"), Packing("none")]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_skeleton(family: str, tmp_path: Path) -> None:
    config = tiny_config(family, hidden_size=72, intermediate_size=100, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    skeleton = Skeleton(config, torch.bfloat16)
    shape = find_shape(str(tmp_path))
    assert shape.num_layers == len(skeleton.layer_paths)
    assert shape.linear_shapes() == skeleton.linear_shapes(0)
    assert (shape.vocabulary, shape.hidden) == skeleton.matrix_shape
    assert shape.is_tied == skeleton.is_tied
    assert shape.plain_parameters == sum(torch.Size(s).numel() for s in skeleton.plain_shapes.values())
    linears = [s for i in range(shape.num_layers) for s in skeleton.linear_shapes(i).values()]
    matrices = [skeleton.matrix_shape] * (1 if skeleton.is_tied else 2)
    assert shape.num_parameters == shape.plain_parameters + sum(a * b for a, b in linears + matrices)
    for packing in PACKINGS:
        sizes = PackingSizes(packing.format, packing.double_quant, 2)
        for layout in skeleton.layouts(packing):
            assert sizes.slab_bytes(shape.linear_shapes()) == layout.num_bytes
            packed = sum(sizes.of(s).num_bytes for s in shape.linear_shapes().values())
            assert packed == sum(entry.num_bytes for entry in layout.entries)


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {}, (None, None, None)),
        ("mistral", {"sliding_window": 8}, (8, 8, 8)),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, (None, None, None)),
        ("qwen2-window", {}, (None, 8, 8)),
    ],
)
def test_windows(family: str, changes: dict[str, object], windows: tuple[int | None, ...]) -> None:
    assert shape_from_config(tiny_config(family, **changes).to_dict()).windows == windows


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", 6.738),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8.030),
        ("META-LLAMA/LLAMA-3.1-70B", 70.554),
        ("meta-llama/Llama-3.1-405B-Instruct", 405.853),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", 1.236),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.554),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7.248),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494),
        ("Qwen/Qwen2.5-72B", 72.706),
        ("Qwen/Qwen3-0.6B-Base", 0.596),
        ("Qwen/Qwen3-32B", 32.762),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.100),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 0.362),
    ],
)
def test_known_models_have_the_parameters_that_their_makers_state(name: str, billions: float) -> None:
    shape = known_shape(name)
    assert shape is not None
    assert shape.num_parameters / 1e9 == pytest.approx(billions, abs=0.0006)


def test_known_models_are_exact() -> None:
    assert all(shape.is_exact for shape in KNOWN.values())
    assert known_shape("meta-llama/Llama-9-8B") is None


def test_a_snapshot_in_the_hub_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--Own-1B"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    config = {"model_type": "llama"} | tiny_config("llama").to_dict()
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    assert find_shape("someone/Own-1B").hidden == 64
    assert find_shape("someone/Own-1B", "abc").hidden == 64
    with pytest.raises(UserError, match="neither a folder, nor in the hub cache"):
        find_shape("someone/Own-1B", "main2")


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 64}')
    with pytest.raises(UserError, match="num_attention_heads"):
        find_shape(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": float("inf")},
        {"num_hidden_layers": 10**200},
        {"hidden_size": False},
        {"num_key_value_heads": 1e308},
        {"vocab_size": "512"},
        {"max_position_embeddings": None},
        {"quantization_config": "nf4", "tie_word_embeddings": False},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": float("inf")},
        {
            "model_type": "smollm3",
            "use_sliding_window": True,
            "sliding_window": 8,
            "no_rope_layers": "llama3",
        },
    ],
    ids=str,
)
def test_a_size_that_is_none_is_said(changes: dict[str, object]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512}
    values = sizes | {"model_type": "llama", "num_attention_heads": 4}
    assert shape_from_config(values).num_layers == 3
    with pytest.raises(UserError, match=r"config\.json: cannot be planned with"):
        shape_from_config(values | changes)


FOUR, EIGHT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}


@pytest.mark.parametrize(
    ("stored", "changes", "head_format"),
    [
        (None, {}, "none"),
        (FOUR, {}, "none"),
        (FOUR | {"llm_int8_skip_modules": None}, {}, "none"),  # the default: all but the head
        (FOUR | {"llm_int8_skip_modules": ["lm_head", "vision"]}, {}, "none"),
        (FOUR | {"llm_int8_skip_modules": ["head"]}, {}, "none"),  # a name's end is enough
        (FOUR | {"llm_int8_skip_modules": ["vision"]}, {}, "nf4"),
        (FOUR | {"llm_int8_skip_modules": []}, {}, "nf4"),
        (FOUR | {"llm_int8_skip_modules": [], "bnb_4bit_quant_type": "fp4"}, {}, "fp4"),
        (FOUR | {"llm_int8_skip_modules": []}, {"hidden_size": 72}, "none"),
        (EIGHT | {"llm_int8_skip_modules": []}, {"hidden_size": 72}, "int8"),
        (EIGHT | {"llm_int8_skip_modules": []}, {"tie_word_embeddings": True}, "none"),
        ({"quant_method": "gptq", "llm_int8_skip_modules": []}, {}, "none"),
    ],
)
def test_whether_the_head_is_packed(stored: object, changes: dict[str, object], head_format: str) -> None:
    values = tiny_config("llama").to_dict() | changes | {"quantization_config": stored}
    assert shape_from_config(values).head_format == head_format
