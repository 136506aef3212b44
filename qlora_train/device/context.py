"""Measures the device context of this process: its device memory outside torch's allocator.

    context bytes = in use after  -  in use before  -  reserved by torch's allocator

The context holds loaded kernels too. "Before": by all processes, before this one has a context; nvidia-smi
reports it without creating one. "After": once products have run forward and backward, since kernels are
loaded at first use. Both readings are the driver's, so the memory of other processes cancels, except what
they allocate or free in between. NVML's bytes per process would need no reading before, but in containers
its list is empty or has other process ids, and under WSL it has no bytes.

Without a reading before (in a notebook with an existing context, on ROCm, on a slice of a card), the stated
bytes for the card's capability are used (description.py), or all memory in use outside torch's allocator if
that is less: it includes other processes, so it is an upper bound.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from qlora_train.device import driver
from qlora_train.device.compute import ComputeDevice


@cache
def in_use_before() -> dict[str, int]:
    """Bytes in use by card UUID before this process had a context; empty if it has one already.

    Read once per process: call it before anything uses a device."""
    return {} if driver.has_context() else driver.memory_in_use()


_measured: dict[str, int] = {}
"""Context bytes by card UUID. Measured once, since a process has one context per card."""


def context_bytes(device: ComputeDevice) -> int:
    """Bytes of this process's context on an accelerator, measured if possible, else stated."""
    if device.uuid in _measured:
        return _measured[device.uuid]
    make_workspaces(device)
    device.release_cached()
    bound = max(0, device.total_bytes - device.free_bytes - device.reserved_bytes)
    before = in_use_before().get(device.uuid)
    after = None if before is None else driver.memory_in_use().get(device.uuid)
    if before is not None and after is not None:
        measured = after - before - device.reserved_bytes
        if 0 < measured <= bound:  # else other processes' memory changed meanwhile
            _measured[device.uuid] = measured
            return measured
    return min(device.description.stated_context_bytes, bound)


@torch.inference_mode(False)
@torch.enable_grad()
def make_workspaces(device: ComputeDevice) -> None:
    """Make cuBLAS allocate its workspaces, by products forward and backward, and wait for them.

    cuBLAS allocates a workspace from torch's allocator at the first product of each thread, and backward runs
    in autograd's thread. A plan counts them with the context. Gradients are enabled here in any case."""
    for dtype in (torch.float32, torch.float16):
        a = torch.ones(64, 64, dtype=dtype, device=device.torch, requires_grad=True)
        b = torch.ones(64, dtype=dtype, device=device.torch)
        F.linear(a, a, b).addmm(a, a).sum().backward()
    device.wait()
