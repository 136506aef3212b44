"""Where a base model's files are, and in which precision to compute.

`model.base` is a folder, or a hub id that is downloaded (safetensors, configs and tokenizer files only: a
pickle is never fetched, let alone opened) and pinned to the commit it resolved to.
"""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_train.device.description import DeviceDescription
from qlora_train.errors import BaseModelError, UserError

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_base(base: str, revision: str | None) -> tuple[Path, str | None]:
    """The local folder of a base and, for a hub id, the commit it stands for.

    Raises `BaseModelError` for a missing folder or a hub id that cannot be fetched.
    """
    folder = Path(base)
    if folder.is_dir():
        if revision is not None:
            raise BaseModelError(
                f"model.revision is {revision}, but model.base is the local folder {base}: remove "
                "the revision"
            )
        return folder, None
    if folder.is_absolute() or base.startswith(".") or base.count("/") > 1:
        raise BaseModelError(f"model.base: there is no folder {base}")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BaseModelError(
            f"model.base: there is no folder {base}, and as a hub id it cannot be fetched ({reason})"
        ) from error
    return folder, folder.name


def resolve_dtype(name: str, device: DeviceDescription) -> torch.dtype:
    """The compute dtype. "auto": bfloat16 where the hardware multiplies it, else float16 on a GPU, float32 on
    a CPU.

    Raises `UserError` for bfloat16 on a GPU that only emulates it.
    """
    if name != "auto":
        if name == "bfloat16" and device.is_accelerator and not device.has_bfloat16:
            raise UserError("model.compute_dtype: this GPU has no bfloat16 arithmetic; use float16 (or auto)")
        return _DTYPES[name]
    if device.is_accelerator:
        return torch.bfloat16 if device.has_bfloat16 else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The recipe's word for a dtype."""
    return next(name for name, known in _DTYPES.items() if known == dtype)
