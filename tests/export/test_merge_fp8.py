"""Merging onto a base in FP8: 16-bit weights without scales, those of the base that FP8 stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_bases import write_fp8_copy
from safetensors.torch import load_file, save_file
from tiny_models import NF4, write_checkpoint
from transformers import AutoModelForCausalLM

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.adapter_files import save_adapter
from qlora_train.export.merge import merge
from qlora_train.quant.formats import Quantization

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 72}


@pytest.mark.parametrize("quantization", [None, NF4], ids=["original", "dequantized"])
@pytest.mark.parametrize("family,changes", [("llama", {}), ("qwen3_moe", EXPERTS)], ids=["llama", "experts"])
def test_merged_weights_are_those_of_the_products(
    tmp_path: Path, family: str, changes: dict[str, Any], quantization: Quantization | None
) -> None:
    plain = write_checkpoint(tmp_path / "plain", family, **changes)
    more = {"mtp.layers.0.mlp.up_proj.weight": torch.randn(60, 50)}  # of no part that is trained
    save_file(load_file(plain / "model.safetensors") | more, plain / "model.safetensors", {"format": "pt"})
    base = write_fp8_copy(plain, tmp_path / "base", block=[48, 40])
    shape = load_file(base / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator)
    save_adapter(
        tmp_path / "adapter",
        AdapterConfig("base", 4, 8, target_modules=["o_proj"]),
        {f"model.layers.{i}.self_attn.o_proj": (a, b) for i in range(3)},
    )
    merged = {}
    for folder in (base, tmp_path / "base-16"):
        out = tmp_path / f"merged-{folder.name}"
        merge(folder, tmp_path / "adapter", out, quantization=quantization, dtype=torch.bfloat16)
        merged[folder.name] = load_file(out / "model.safetensors")
    ours, theirs = merged["base"], merged["base-16"]
    assert ours.keys() == theirs.keys() and {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)
    assert "quantization_config" not in json.loads((tmp_path / "merged-base/config.json").read_text())

    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged-base", dtype=torch.bfloat16, output_loading_info=True
    )
    assert (
        not info["missing_keys"] and not info["mismatched_keys"] and set(info["unexpected_keys"]) <= set(more)
    )
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], ours[name]) for name in loaded if name in ours)
