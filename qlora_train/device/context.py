"""What a process holds on the device beside tensors: the context, and the kernels that are loaded into it.

    in use after  -  in use before  -  reserved by torch's allocator

"Before": by all processes, before this one has a context, which nvidia-smi tells without making one. "After":
when products, forward and back, have run, because kernels are loaded when they are first used. Both readings
are the driver's, so that what others hold cancels (what they take or free in these seconds does not). NVML's
list of bytes per process would need no reading before, but in containers it is empty or has other process
ids, and under WSL it has no bytes.

Where there is no reading before (a notebook whose context exists already, ROCm, a slice of a card), the
stated bytes for the card's capability stand (description.py), or all that is in use beside torch's allocator
if that is less: it counts other processes too, so it is a bound.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from qlora_train.device import driver
from qlora_train.device.compute import ComputeDevice


@cache
def in_use_before() -> dict[str, int]:
    """Bytes in use by UUID before this process had a context; empty where it is too late to ask. Asked once:
    call it before anything touches a device."""
    return {} if driver.has_context() else driver.memory_in_use()


_measured: dict[str, int] = {}
"""By UUID. A process has one context on a card; at its next command others may hold more or less there."""


def context_bytes(device: ComputeDevice) -> int:
    """Of this process on an accelerator; see the module docstring."""
    if device.uuid in _measured:
        return _measured[device.uuid]
    make_workspaces(device)
    device.release_cached()
    bound = max(0, device.total_bytes - device.free_bytes - device.reserved_bytes)
    before = in_use_before().get(device.uuid)
    after = None if before is None else driver.memory_in_use().get(device.uuid)
    if before is not None and after is not None:
        measured = after - before - device.reserved_bytes
        if 0 < measured <= bound:  # else somebody else's memory went or came meanwhile
            _measured[device.uuid] = measured
            return measured
    return min(device.description.stated_context_bytes, bound)


@torch.inference_mode(False)
@torch.enable_grad()
def make_workspaces(device: ComputeDevice) -> None:
    """Let cuBLAS take its workspaces, and wait for it: products forward and back, since it takes one for each
    thread that multiplies (the backward pass is autograd's own thread) at the thread's first product, from
    torch's allocator. A plan counts them with the context. The caller may have switched gradients off."""
    for dtype in (torch.float32, torch.float16):
        a = torch.ones(64, 64, dtype=dtype, device=device.torch, requires_grad=True)
        b = torch.ones(64, dtype=dtype, device=device.torch)
        F.linear(a, a, b).addmm(a, a).sum().backward()
    device.wait()
