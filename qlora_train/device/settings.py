"""Process-wide torch settings of a run, applied before anything is computed.

- cuDNN's attention is off. From compute capability 9.0 on torch prefers it to flash; it builds an execution
  plan for every new shape, which changes with every micro-batch, and its scratch is not in our plans.
- Products of 16-bit numbers are summed in fp32. By default torch allows cuBLAS to add the parts of a split
  product in 16 bits; gradients of LoRA parameters, sums over all tokens of a micro-batch, would lose bits.
- The allocator's segments can grow (`expandable_segments`; NVIDIA under Linux): otherwise tensors with
  varying sizes fragment the memory. A setting of the user's is kept.
- Deterministic algorithms, if the recipe asks for them, until the run ends.

All but the last apply to GPUs only and have no effect on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora_train.device import driver
from qlora_train.device.context import in_use_before
from qlora_train.device.description import (
    DETERMINISTIC_WORKSPACE,
    WORKSPACE_VARIABLE,
    allocator_setting,
    segments_may_expand,
)
from qlora_train.errors import UserError


def apply_settings() -> None:
    """Apply all settings but determinism; call it before the first tensor is on the device.

    First reads the device memory in use by other processes (device/context.py)."""
    in_use_before()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if allocator_setting() is None and segments_expand():
        _set_allocator("expandable_segments:True")


def _set_allocator(settings: str) -> None:
    """Set what PYTORCH_ALLOC_CONF would, also after torch was imported, as in a notebook."""
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (newer or torch.cuda.memory._set_allocator_settings)(settings)


def segments_expand() -> bool:
    """Whether torch's allocator uses expandable segments once the settings are applied: if every card
    supports them. On a virtual GPU that does not, the first tensor would fail."""
    needed = (driver.VIRTUAL_MEMORY_MANAGEMENT, driver.MEMORY_BY_FILE_DESCRIPTOR)
    able = [driver.attribute(i, number) for i in range(driver.num_cards()) for number in needed]
    return segments_may_expand() and bool(able) and all(able)


def make_deterministic() -> None:
    """Make every run give the same bits: flash attention and scatter operations use slower algorithms."""
    os.environ.setdefault(WORKSPACE_VARIABLE, DETERMINISTIC_WORKSPACE)  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    # Else every torch.empty is filled. No code here reads memory that it has not written: tests fill the
    # ring's slots with wrong numbers to check it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def determinism_of_before() -> Iterator[None]:
    """Context that restores torch's determinism settings at its end: other work in a notebook may need
    operations without a deterministic algorithm."""
    is_on = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=only_warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def require_deterministic_products(where: torch.device) -> None:
    """Raise `UserError` if torch is set to be deterministic but refuses products on the device `where`.

    torch reads CUBLAS_WORKSPACE_CONFIG once per process, at the first product on a GPU, so that a later
    `make_deterministic` has no effect on it."""
    if where.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return
    try:
        torch.ones(16, 16, device=where).mm(torch.ones(16, 16, device=where))
    except RuntimeError as error:
        if WORKSPACE_VARIABLE not in str(error):
            raise
        raise UserError(
            "training.deterministic: this process multiplied on the GPU before it was asked to be "
            f"deterministic, or {WORKSPACE_VARIABLE} has another value than :4096:8 or :16:8. Set "
            f"{WORKSPACE_VARIABLE}=:4096:8 in the environment and start the process anew (in a notebook: its "
            "kernel)"
        ) from error
