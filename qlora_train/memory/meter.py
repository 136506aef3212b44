"""How much memory there is, and how much was used: one definition for logs, tests and measurements.

On CUDA the peak is the allocator's (`max_memory_allocated`): what our tensors took. On the CPU it is the
process's peak resident size as the kernel counts it (`ru_maxrss`), Python and libraries included, since
nothing else is exact there.
"""

from __future__ import annotations

import resource
import sys

import psutil
import torch


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of our tensors on CUDA, of the whole process otherwise."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak_bytes()


def process_peak_bytes() -> int:
    """Peak resident size of this process, as the kernel reports it."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(device: torch.device) -> int:
    """Memory that tensors on `device` could still take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
