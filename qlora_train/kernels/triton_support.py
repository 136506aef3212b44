"""Test of whether Triton kernels run on a GPU of this machine.

Triton comes with torch for CUDA but needs more than torch: a C compiler and Python's headers, with which it
builds its launcher at the first launch, a writable cache folder, and a GPU that its assembler supports. A
kernel is launched once per process to test all of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


@cache
def triton_runs(device: torch.device) -> bool:
    """Whether a Triton kernel can be launched on this GPU; if not, warns once with the reason."""
    return runs(_launch, torch.zeros(1, dtype=torch.int32, device=device))


def runs(launch: Callable[[Tensor], None], one: Tensor) -> bool:
    """Whether `launch` adds 1 to `one`, int32 [1], initially 0; warns with the reason if not."""
    try:
        launch(one)
        reason = None if one.item() == 1 else "a kernel ran, but wrote nothing"
    except Exception as error:  # any type; all are reported
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        warnings.warn(
            f"Triton does not run on {one.device} ({reason}). Slower library kernels take the place of ours; "
            "the results are the same. Triton needs a C compiler and Python's headers on the machine.",
            stacklevel=2,
        )
    return reason is None


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which Triton launches on the tensor's device instead of the current one. Without effect for
    CPU tensors, as in Triton's interpreter."""
    where = tensor.device
    return nullcontext() if where.index is None else torch.get_device_module(where).device(where)


def _launch(one: Tensor) -> None:
    from qlora_train.kernels.triton_probe import add_one  # fails where Triton is not installed

    with launching_on(one):
        add_one[(1,)](one)
