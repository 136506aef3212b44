"""Checkpoints in FP8 for tests, in every form in which scales are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS = ("blocks", "bfloat16-blocks", "tensor", "one-tensor", "rows", "flat-rows", "ue8m0", "ue8m0-bytes")
FP8_MAX = 448.0


def block_of(kind: str) -> list[int] | None:
    """weight_block_size in the config.json of a checkpoint of this kind."""
    return {"ue8m0-bytes": [1, 32]}.get(kind, [128, 128]) if "blocks" in kind or "ue8m0" in kind else None


def to_fp8(
    weight: Tensor, kind: str, block: list[int] | None = None, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales as they are stored, what they stand for in float32) of a matrix or several."""
    rows, columns = weight.shape[-2:]
    size = block or block_of(kind) or [rows if "tensor" in kind else 1, columns]
    grid = [-(-rows // size[0]), -(-columns // size[1])]
    padded = torch.zeros(*weight.shape[:-2], grid[0] * size[0], grid[1] * size[1])
    padded[..., :rows, :columns] = weight
    blocks = padded.unflatten(-1, (grid[1], size[1])).unflatten(-3, (grid[0], size[0]))
    scales = blocks.abs().amax((-3, -1)).clamp(min=1e-12) / FP8_MAX
    stored = scales
    if "ue8m0" in kind:
        exponents = (torch.log2(scales).ceil() + 127).to(torch.uint8)
        stored = exponents if "bytes" in kind else exponents.view(torch.float8_e8m0fnu)
        scales = torch.exp2(exponents.float() - 127)
    elif kind == "bfloat16-blocks":
        stored = scales.bfloat16()
        scales = stored.float()
    elif kind in ("tensor", "flat-rows"):
        stored = scales.flatten() if kind == "flat-rows" else scales.reshape(())
    whole = scales.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)[..., :rows, :columns]
    codes = (weight / whole).to(dtype)
    return codes, stored, codes.float() * whole


def write_fp8_copy(
    plain: Path, folder: Path, kind: str = "blocks", *, block: list[int] | None = None, kept: str = ""
) -> Path:
    """The checkpoint `plain` with every linear of its layers in FP8, in `folder`; and in `folder`-16 the same
    numbers in float32. kept: the one module that is not converted besides embedding, head, routers."""
    block = block or block_of(kind)
    config: dict[str, Any] = json.loads((plain / "config.json").read_text())
    fp8: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if ".layers." in name and tensor.ndim == 2 and not module.endswith((".gate", kept or ".gate")):
            fp8[name], scales, products[name] = to_fp8(tensor, kind, block)
            fp8[name + ("_scale" if "row" in kind else "_scale_inv")] = scales
        else:
            fp8[name] = products[name] = tensor
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    beside = folder.with_name(folder.name + "-16")
    for target, tensors, extra in (
        (folder, fp8, {"quantization_config": stored}),
        (beside, products, {}),
    ):
        target.mkdir()
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config | extra))
    return folder
