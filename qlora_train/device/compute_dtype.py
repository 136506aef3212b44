"""The compute dtype: from the recipe's `model.compute_dtype` and the device."""

from __future__ import annotations

import torch

from qlora_train.device.description import DeviceDescription
from qlora_train.errors import UserError

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_dtype(name: str, device: DeviceDescription) -> torch.dtype:
    """The dtype for `name`. "auto": bfloat16 if the hardware multiplies it, else float16 on a GPU and float32
    on a CPU.

    Raises `UserError` for bfloat16 on a GPU that only emulates it.
    """
    if name != "auto":
        if name == "bfloat16" and device.is_accelerator and not device.has_bfloat16:
            raise UserError("model.compute_dtype: this GPU has no bfloat16 arithmetic; use float16 (or auto)")
        return COMPUTE_DTYPES[name]
    if device.is_accelerator:
        return torch.bfloat16 if device.has_bfloat16 else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The recipe's name of a compute dtype, such as "bfloat16"."""
    return next(name for name, known in COMPUTE_DTYPES.items() if known == dtype)
