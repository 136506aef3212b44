"""Checkpoints that bitsandbytes quantized."""

from __future__ import annotations

import json
import math
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file

from qlora_train.errors import BaseModelError
from qlora_train.files.shards import ShardReader
from qlora_train.quant.formats import Quantization
from qlora_train.weights.bitsandbytes_checkpoint import (
    bitsandbytes_shape,
    is_bitsandbytes_constant,
    read_bitsandbytes_weight,
)

NAME = "model.layers.0.mlp.up_proj.weight"


def bitsandbytes_tensors(
    form: str, double_quant: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight as bitsandbytes' layers save it, and its fp32 values."""
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    if form == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        parts = {
            NAME: codes,
            NAME.replace("weight", "SCB"): scales,
            NAME + "_format": torch.tensor(0, dtype=torch.uint8),
        }
        return parts, bnb.int8_vectorwise_dequant(codes, scales)
    data, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type=form)
    parts = {NAME: data} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    return parts, bnb.dequantize_4bit(data, state)


@pytest.mark.parametrize("form,double_quant", [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)])
def test_checkpoints_quantized_by_bitsandbytes_load_as_they_are(tmp_path, form, double_quant) -> None:
    parts, expected = bitsandbytes_tensors(form, double_quant)
    save_file(parts | {"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with ShardReader(tmp_path) as reader:
        quantized = read_bitsandbytes_weight(reader, NAME)
        assert read_bitsandbytes_weight(reader, "model.norm.weight") is None
        assert bitsandbytes_shape(reader, NAME) == (None if form == "int8" else (24, 128))
    assert (
        quantized is not None
        and quantized.quantization == Quantization(form, double_quant)
        and quantized.shape == (24, 128)
    )
    assert torch.equal(quantized.tensors["data"].view(-1), parts[NAME].view(-1))
    assert torch.equal(quantized.dequantize(torch.float32), expected)
    constants = {name for name in parts if is_bitsandbytes_constant(name)}
    assert constants == set(parts) - {NAME}


def damage_state(parts: dict[str, torch.Tensor], **changes: object) -> None:
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(parts[key].numpy())) | changes
    parts[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.pop(f"{NAME}.absmax"),
        lambda p: p.update({NAME: p[NAME][:-1]}),
        lambda p: p.update({f"{NAME}.nested_absmax": torch.ones(7)}),
        lambda p: p.update({f"{NAME}.quant_map": torch.zeros(16)}),
        lambda p: p.update({f"{NAME}.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)}),
        lambda p: damage_state(p, shape=[24, 64]),
        lambda p: damage_state(p, shape=[math.inf, 128]),
        lambda p: damage_state(p, nested_offset=math.nan),
        lambda p: damage_state(p, blocksize=48),
        lambda p: damage_state(p, nested_blocksize=128),
        lambda p: p.pop(f"{NAME}.quant_state.bitsandbytes__nf4"),
    ],
)
def test_damaged_quantized_weights_are_refused_by_name(tmp_path: Path, damage) -> None:
    parts, _ = bitsandbytes_tensors("nf4", double_quant=True)
    damage(parts)
    save_file(parts, tmp_path / "model.safetensors")
    with ShardReader(tmp_path) as reader, pytest.raises(BaseModelError, match="up_proj"):
        read_bitsandbytes_weight(reader, NAME)
