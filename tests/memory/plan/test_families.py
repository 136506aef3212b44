"""The table of families against transformers' own models of them, for every config.json a family may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config

from qlora_train.memory.plan.families import FAMILIES
from qlora_train.memory.plan.model_shape import ModelShape, find_shape, shape_from_config
from qlora_train.memory.plan.packed_sizes import PackingSizes
from qlora_train.model.base import Skeleton, read_config
from qlora_train.model.fused import FusedMlp, FusedNorm, fuse_mlps, fuse_norms
from qlora_train.model.probe import probe
from qlora_train.model.quantize import Packing

SIZES = {"hidden_size": 192, "intermediate_size": 100, "num_hidden_layers": 7, "num_attention_heads": 6}
NEEDS_HEAD_DIM = ("ministral", "hunyuan_v1_dense")  # their code divides by what the config does not have
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "wide heads": {"head_dim": 48},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "use_bias": True, "attention_out_bias": True},
    "no biases": {"attention_bias": False, "mlp_bias": False, "use_bias": False, "attention_out_bias": False},
    "windows": {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 3},
    "no windows": {"sliding_window": None, "use_sliding_window": False},
    "windows not used": {"sliding_window": 20, "use_sliding_window": False},
    "another pattern": {"sliding_window": 20, "sliding_window_pattern": 3},
    "groups": {"num_key_value_heads": 3},
    "no groups": {"num_key_value_heads": None},
}
NOT_FOR = {
    "no groups": (
        *("mistral", "ministral", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "exaone4"),
        *("starcoder2", "helium"),
    ),
    "no windows": ("exaone4",),
}
"""What transformers cannot read or build."""
CASES = [(family, name) for family in FAMILIES for name in CHANGES if family not in NOT_FOR.get(name, ())]


def written(folder: Path, family: str, changes: dict[str, Any]) -> Path:
    """A config.json that says sizes and what is changed, as people write them."""
    values = {"model_type": family, "vocab_size": 96, "max_position_embeddings": 512} | SIZES
    values["pad_token_id"] = 0
    if family in NEEDS_HEAD_DIM:
        values["head_dim"] = 32
    values |= changes
    if family == "cohere2":
        values.pop("head_dim", None)  # its code sets hidden / heads
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def windows_of(config: Any) -> tuple[int | None, ...]:
    """Per layer, as the family's own attention is told."""
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "phi3", "starcoder2"):
        return (window,) * config.num_hidden_layers
    if config.model_type in ("qwen2", "qwen3", "smollm3") and not config.use_sliding_window:
        window = None
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def assert_same(shape: ModelShape, skeleton: Skeleton, config: Any) -> None:
    for layer in range(shape.num_layers):
        assert shape.linear_shapes() == skeleton.linear_shapes(layer)
    assert (shape.vocabulary, shape.hidden) == skeleton.matrix_shape
    assert shape.is_tied == skeleton.is_tied
    assert shape.plain_parameters == sum(torch.Size(s).numel() for s in skeleton.plain_shapes.values())
    assert shape.windows == windows_of(config)
    packing = PackingSizes("nf4", True, 2)
    for layout in skeleton.layouts(Packing("nf4", True)):
        assert packing.slab_bytes(shape.linear_shapes()) == layout.num_bytes


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_the_shape_is_that_of_the_model(family: str, changes: str, tmp_path: Path) -> None:
    folder = written(tmp_path, family, CHANGES[changes])
    config = read_config(folder)
    shape = find_shape(str(folder))
    assert shape.is_known
    assert_same(shape, Skeleton(config, torch.bfloat16), config)
    config.save_pretrained(tmp_path / "saved")  # what transformers itself writes says the same
    assert find_shape(str(tmp_path / "saved")) == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_accepts_every_family_in_the_table_and_finds_its_tail(family: str) -> None:
    options = {"head_dim": 16} if family in NEEDS_HEAD_DIM else {}
    options |= {"no_rope_layers": [1, 0, 1]} if family == "smollm3" else {}
    config = tiny_config(family, **options)
    shape = shape_from_config(config.to_dict())
    assert probe(config).tail_name == (shape.tail_name if shape.may_skip_tail else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_knows_whose_norms_and_mlps_are_fused(family: str) -> None:
    options = {"head_dim": 16} if family in NEEDS_HEAD_DIM else {}
    options |= {"no_rope_layers": [1, 0, 1]} if family == "smollm3" else {}
    config = tiny_config(family, **options)
    found, shape = probe(config), shape_from_config(config.to_dict())
    assert (
        found.fuses_norms and found.fuses_mlps and found.fuses_qkv
    )  # nothing is swapped that is not the same
    torch.manual_seed(0)
    skeleton = Skeleton(config, torch.bfloat16)
    layers = skeleton.model.get_decoder().layers.to_empty(device="cpu")
    for parameter in layers.parameters():
        parameter.data.uniform_(0.5, 1.5)
    fuse_norms(layers)
    fuse_mlps(layers)
    assert any(isinstance(m, FusedNorm) for m in layers.modules()) == shape.family.fuses_norms
    gated = len(shape.family.mlp) == 3
    assert any(isinstance(m, FusedMlp) for m in layers.modules()) == gated


def test_another_family_is_an_estimate() -> None:
    shape = shape_from_config(tiny_config("llama").to_dict() | {"model_type": "llama9"})
    assert not shape.is_known and not shape.is_exact
