"""Tiny gpt_oss checkpoints whose experts are in MXFP4, as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_model, tiny_config
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

STORED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def random_mxfp4(num_experts: int, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(blocks, scales) of [E, rows, columns] numbers around 0.05, every code among them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (num_experts, rows, columns // 32, 16), generator=generator)
    scales = torch.randint(118, 123, (num_experts, rows, columns // 32), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def write_mxfp4_base(folder: Path, **changes: Any) -> Path:
    """A checkpoint in `folder`; and in `folder`-16 the same numbers in float32, transposed as transformers
    has them."""
    sizes = {"intermediate_size": 96} | changes
    beside = folder.with_name(folder.name + "-16")
    random_model(tiny_config("gpt_oss", **sizes)).save_pretrained(beside)
    config: dict[str, Any] = json.loads((beside / "config.json").read_text())
    numbers = load_file(beside / "model.safetensors")
    tensors = dict(numbers)
    for seed, name in enumerate(sorted(name for name in numbers if name.endswith("_proj"))):
        num_experts, columns, rows = numbers[name].shape
        blocks, scales = random_mxfp4(num_experts, rows, columns, seed)
        numbers[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(numbers, beside / "model.safetensors", {"format": "pt"})
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": STORED}))
    return folder
