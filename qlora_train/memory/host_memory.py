"""Memory on the host that the device copies from and to: exact in size, pinned where there is a GPU.

A copy between GPU and ordinary (pageable) memory goes through a staging buffer of the driver and makes the
host wait. Pinned pages are copied by the GPU alone, at the bus's full rate, while everything else goes on.
torch's own pinned allocator rounds up to powers of two: a slab of 113 MB would take 128, a head of 1.05 GB
two. So pages come from the kernel (`mmap`) and are registered with CUDA as they are.

Where the system refuses to pin (a container's limit on locked memory, say), buffers stay pageable: slower,
never wrong, and said once (`refused`; unpinned.py says what it costs).

Nothing here is made by torch's allocator, so a meter of the compute device never counts it, also where that
device is the CPU.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Pinning(Protocol):
    """Makes host pages such that a device can copy from and to them by itself."""

    def pin(self, buffer: Tensor) -> bool:
        """False where the system refuses."""
        ...

    def unpin(self, address: int) -> None:
        """Of a buffer that was pinned, while it is still there."""
        ...


class CudaPinning:
    """The CUDA runtime's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pin(self, buffer: Tensor) -> bool:
        error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
        if int(error) == 0:
            return True
        # The runtime keeps the error for this thread's next kernel launch to raise: let that be ours.
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self._device).fill_(0)
        return False

    def unpin(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


class HostMemory:
    """Hands out buffers of exact size."""

    def __init__(
        self,
        device: torch.device,
        *,
        pinning: Pinning | None = None,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        """device: whose copies the buffers serve. pinning: None is CUDA's for a GPU, and none elsewhere.
        refused: called at the first refusal, after which no buffer is pinned any more."""
        self._device, self._refused = device, refused
        self._pinning = CudaPinning(device) if pinning is None and device.type == "cuda" else pinning
        self.pinned = True
        """False once the system has refused to pin a buffer."""
        self.num_bytes = 0
        """Alive now."""
        self._spare: list[Tensor] = []

    def empty(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], page-aligned."""
        assert num_bytes > 0
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        self.num_bytes += num_bytes
        unpin = self._pinning.unpin if self._pinning is not None and self._pin(buffer) else None
        weakref.finalize(
            buffer.untyped_storage(), _forget, weakref.ref(self), num_bytes, buffer.data_ptr(), unpin
        )
        return buffer

    def borrow(self, num_bytes: int) -> Tensor:
        """uint8, at least num_bytes: pinning costs more than a copy, so buffers given back are used again.

        Sizes that follow the data differ from step to step. A spare buffer serves if it is at most a quarter
        too large; where none does, one that has become useless makes room.
        """
        fitting = [b for b in self._spare if num_bytes <= b.numel() <= num_bytes + num_bytes // 4]
        if not fitting and self._spare:
            if self._device.type == "cuda":
                # A copy from it may still be under way; rare, because sizes settle.
                torch.cuda.synchronize(self._device)
            self._spare.pop(0)
        if not fitting:
            return self.empty(num_bytes)
        best = min(fitting, key=lambda buffer: buffer.numel())
        self._spare = [buffer for buffer in self._spare if buffer is not best]
        return best

    def give_back(self, buffer: Tensor) -> None:
        """For a later `borrow`."""
        self._spare.append(buffer)

    def _pin(self, buffer: Tensor) -> bool:
        if not self.pinned:
            return False
        assert self._pinning is not None
        self.pinned = self._pinning.pin(buffer)
        if not self.pinned:
            self._refused()
        return self.pinned


def _forget(
    owner: weakref.ref[HostMemory], num_bytes: int, address: int, unpin: Callable[[int], None] | None
) -> None:
    """When a buffer goes. Not a method: it would keep the owner, and with it every spare buffer, alive."""
    memory = owner()
    if memory is not None:
        memory.num_bytes -= num_bytes
    if unpin is not None:
        unpin(address)
