"""What a run tells torch about the device, for the whole process, before anything is computed.

- cuDNN's attention is off. On compute capability 9.0 and later torch prefers it to flash; it builds a plan
  for every new shape, and shapes change with every micro-batch, and takes scratch that no plan counts.
- Products of 16-bit numbers are summed in fp32. torch allows cuBLAS to add the parts of a split product in 16
  bits, by default; factor gradients, sums over all tokens of a micro-batch, would lose bits there.
- Memory of the allocator may grow in place (`expandable_segments`, Linux): tensors whose sizes follow the
  data otherwise leave holes that nothing fits into.
- Deterministic algorithms, where the recipe asks for them.

All but the last hold for a GPU only and change nothing on a CPU.
"""

from __future__ import annotations

import os
import sys

import torch

from qlora_train.device.description import DETERMINISTIC_WORKSPACE, WORKSPACE_VARIABLE

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def apply_settings() -> None:
    """Before the first tensor is on the device; what the user has said of the allocator stays."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if segments_may_expand():
        _set_allocator("expandable_segments:True")


def _set_allocator(settings: str) -> None:
    """What PYTORCH_ALLOC_CONF says, also where torch is imported already, as in a notebook."""
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (newer or torch.cuda.memory._set_allocator_settings)(settings)


def segments_may_expand() -> bool:
    """Whether torch's allocator is told to map more memory behind what it has, instead of taking whole
    segments: on Linux, unless the environment configures the allocator."""
    return sys.platform == "linux" and not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES)


def make_deterministic() -> None:
    """The same bits in every run: flash attention and scatter operations take their slower algorithms."""
    os.environ.setdefault(WORKSPACE_VARIABLE, DETERMINISTIC_WORKSPACE)  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    # Else every torch.empty is filled first. Nothing here reads memory that it has not written: tests
    # poison the ring's slots to see it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
