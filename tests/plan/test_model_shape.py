"""Shapes: sizes are those of the real skeleton, known names are found, what train refuses is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tiny_models import FAMILIES, tiny_config

from qlora_train.device.description import planned_gpu
from qlora_train.errors import QloraTrainError, UserError
from qlora_train.model.base import MetaModel
from qlora_train.plan.base_config import find_config
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.known_models import KNOWN
from qlora_train.plan.model_shape import find_shape, known_shape, shape_of
from qlora_train.recipe import Recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_skeleton(family: str, tmp_path: Path) -> None:
    config = tiny_config(family, hidden_size=72, intermediate_size=100, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    meta_model, shape = MetaModel(config, torch.bfloat16), find_shape(str(tmp_path))
    linears = [s for i in range(shape.num_layers) for s in dict(meta_model.layer_shapes(i).items()).values()]
    matrices = [meta_model.matrix_shape] * (1 if meta_model.is_tied else 2)
    plain = list(meta_model.plain_shapes.values())
    assert shape.num_parameters == sum(torch.Size(s).numel() for s in [*linears, *matrices, *plain])
    modules = dict(meta_model.model.named_modules())
    assert all(
        size == (modules[path].out_features, modules[path].in_features)
        for path, size in shape.linear_shapes.items()
    )
    assert len(shape.linear_shapes) == len(linears)
    assert find_config(str(tmp_path))["hidden_size"] == shape.hidden == 72


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", 6.738),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8.030),
        ("META-LLAMA/LLAMA-3.1-70B", 70.554),
        ("meta-llama/Llama-3.1-405B-Instruct", 405.853),
        ("unsloth/Llama-3.2-1B-Instruct", 1.236),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.554),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7.248),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494),
        ("Qwen/Qwen2.5-72B", 72.706),
        ("Qwen/Qwen3-0.6B-Base", 0.596),
        ("Qwen/Qwen3-32B", 32.762),
        ("mistralai/Mistral-Nemo-Instruct-2407", 12.248),
        ("mistralai/Mistral-Small-24B-Instruct-2501", 23.572),
        ("google/gemma-3-1b-it", 1.000),
        ("google/gemma-3-4b-pt", 3.880),
        ("google/gemma-3-12b-it", 11.766),
        ("google/gemma-3-27b-it", 27.009),
        ("google/gemma-4-26B-A4B-it", 25.233),
        ("google/gemma-4-31B-it", 30.697),
        ("microsoft/phi-4", 14.660),
        ("HuggingFaceTB/SmolLM3-3B", 3.075),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.100),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 0.362),
    ],
)
def test_known_models_have_the_parameters_that_their_makers_state(name: str, billions: float) -> None:
    shape = known_shape(name)
    assert shape is not None
    assert shape.num_parameters / 1e9 == pytest.approx(billions, abs=0.0006)


def test_of_heads_that_differ_between_layers_the_largest_count() -> None:
    shape = known_shape("google/gemma-4-26B-A4B-it")
    assert shape is not None
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (16, 8, 512)


def test_an_unknown_model_is_none() -> None:
    assert known_shape("meta-llama/Llama-9-8B") is None and find_config("meta-llama/Llama-9-8B") == {}
    for other in ("someone/Llama-3.1-8B", "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"):  # may be another model
        assert known_shape(other) is None and find_config(other) == {}
    assert find_config("unsloth/Llama-3.2-1B-Instruct")["hidden_size"] == 2048
    families = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "mixtral", "olmoe"}
    families |= {"gemma3_text", "gemma4_text", "phi3", "smollm3"}
    assert {values["model_type"] for values in KNOWN.values()} == families


def test_a_snapshot_in_the_hub_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--someone--Own-1B"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    config = {"model_type": "llama"} | tiny_config("llama").to_dict()
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    assert find_shape("someone/Own-1B").hidden == 64
    assert find_shape("someone/Own-1B", "abc").hidden == 64
    for base, revision in (("someone/Own-1B", "main2"), ("no model", None), ("a--b", None)):
        with pytest.raises(UserError, match=f"{base} is neither a folder, nor in the hub"):
            find_shape(base, revision)


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 64}')
    with pytest.raises(QloraTrainError, match="bert"):
        find_shape(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**200},
        {"hidden_size": False},
        {"num_key_value_heads": 1e308},
        {"vocab_size": "512"},
        {"vocab_size": 10**12},
        {"model_type": "mixtral", "num_local_experts": 10**8},
        {"quantization_config": "nf4", "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_size_that_is_none_is_said(changes: dict[str, object], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512}
    values = sizes | {"model_type": "llama", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert find_shape(str(tmp_path)).num_layers == 3
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(QloraTrainError, match=r"config\.json"):
        find_shape(str(tmp_path))


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
def test_whether_the_head_is_quantized(stored: object, changes: dict[str, object], head_format: str) -> None:
    config = tiny_config("llama", **{"hidden_size": 64} | changes)
    config.quantization_config = stored
    assert shape_of(config).head_quantization.format == head_format


def test_a_sequence_that_train_refuses_is_not_planned(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tiny_config("llama", rope_parameters=rope).save_pretrained(tmp_path)
    values = {"model": {"base": str(tmp_path)}, "data": {"train": "x", "sequence_length": 256}}
    plan = plan_recipe(Recipe.from_dict(values), planned_gpu(None, None), 8 * 2**30)
    assert plan.fits
    longer = values | {"data": {"train": "x", "sequence_length": 512}}
    with pytest.raises(QloraTrainError, match="rope type dynamic"):
        plan_recipe(Recipe.from_dict(longer), planned_gpu(None, None), 8 * 2**30)


@pytest.mark.parametrize(
    "keys", [{"target_modules": ["experts.gate_up_proj"]}, {"rank_pattern": {"gate_up_proj": 8}}]
)
def test_experts_are_no_targets_of_lora(keys: dict[str, Any]) -> None:
    recipe = Recipe.from_dict({"model": {"base": "Qwen/Qwen3-30B-A3B"}, "data": {"train": "x"}, "lora": keys})
    with pytest.raises(
        UserError, match="experts are trained where lora.target_parameters names them; there are self_attn"
    ):
        plan_recipe(recipe, planned_gpu("NVIDIA H100", None), 80 * 2**30)
