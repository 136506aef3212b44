"""What a run tells torch about the device, for the whole process, before anything is computed.

- cuDNN's attention is off. On compute capability 9.0 and later torch prefers it to flash; it builds a plan
  for every new shape, and shapes change with every micro-batch, and takes scratch that no plan counts.
- Products of 16-bit numbers are summed in fp32. torch allows cuBLAS to add the parts of a split product in 16
  bits, by default; factor gradients, sums over all tokens of a micro-batch, would lose bits there.
- Memory of the allocator may grow in place (`expandable_segments`; NVIDIA under Linux): tensors whose sizes
  follow the data otherwise leave holes that nothing fits into. What the user has said of the allocator stays.
- Deterministic algorithms, where the recipe asks for them, for as long as the run lasts.

All but the last hold for a GPU only and change nothing on a CPU.
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
    """Before the first tensor is on the device. Notes first what others hold on it (device/context.py)."""
    in_use_before()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if allocator_setting() is None and segments_expand():
        _set_allocator("expandable_segments:True")


def _set_allocator(settings: str) -> None:
    """What PYTORCH_ALLOC_CONF says, also where torch is imported already, as in a notebook."""
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (newer or torch.cuda.memory._set_allocator_settings)(settings)


def segments_expand() -> bool:
    """Whether torch's allocator maps more memory behind what it has, once the settings are applied: where
    every card can. A virtual GPU that cannot would fail at the first tensor."""
    needed = (driver.VIRTUAL_MEMORY_MANAGEMENT, driver.MEMORY_BY_FILE_DESCRIPTOR)
    able = [driver.attribute(i, number) for i in range(driver.num_cards()) for number in needed]
    return segments_may_expand() and bool(able) and all(able)


def make_deterministic() -> None:
    """The same bits in every run: flash attention and scatter operations take their slower algorithms."""
    os.environ.setdefault(WORKSPACE_VARIABLE, DETERMINISTIC_WORKSPACE)  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    # Else every torch.empty is filled first. Nothing here reads memory that it has not written: tests
    # poison the ring's slots to see it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def determinism_of_before() -> Iterator[None]:
    """Afterwards torch is as deterministic as before: in a notebook other work goes on, and some of it has no
    deterministic algorithm."""
    is_on = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=only_warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def require_deterministic_products(where: torch.device) -> None:
    """Raise `UserError` where torch is to be deterministic and refuses products. It looks at
    CUBLAS_WORKSPACE_CONFIG once in a process, at its first product on a GPU: what `make_deterministic` says
    after that is not heard."""
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
