"""Memory on the host that the device copies from and to: exact in size, pinned where there is a GPU.

A copy between GPU and ordinary (pageable) memory goes through a staging buffer of the driver and makes the
host wait. Pinned pages are copied by the GPU alone, at the bus's full rate, while everything else goes on.
torch's own pinned allocator rounds up to powers of two: a layer buffer of 113 MB would take 128, a head of
1.05 GB two. So pages come from the kernel (`mmap`) and are registered with the device's runtime as they are.

A system may refuse to pin (a container's limit on locked memory, say): one large block, or all beyond a sum.
Buffers are then pageable: slower, never wrong, and said once (`refused`; unpinned.py says what it costs). A
refusal is of one buffer; the next is asked for again. Weights that wait in RAM give way: they are copied
through pinned pieces instead (stores.py), at nearly the same rate, while activations that leave and come back
cannot be. So where such a buffer is refused, weights are unpinned, the last first, until it is not. Threads
that copy weights ask and queue the copy in one breath (`copy_if_pinned`): pages must not be unregistered
between the two, nor while the copy is under way.

Nothing here is made by torch's allocator, so a meter of the compute device never counts it, also where that
device is the CPU.
"""

from __future__ import annotations

import mmap
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable
from threading import RLock

import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice


class HostMemory:
    """Hands out buffers of exact size, pinned for `device` where it is an accelerator. Any thread may ask for
    one; borrowing and giving back is for one thread."""

    def __init__(
        self, device: ComputeDevice, *, refused: Callable[[HostMemory], None] = lambda host: None
    ) -> None:
        """refused: called once, when a buffer stays pageable for the first time."""
        self._device, self._refused = device, refused
        self._was_refused = False
        self._alive = _Alive(device)
        self._spares: list[tuple[int, int]] = []
        """(bytes, serial number) of buffers given back, sorted."""
        self._spare_buffers: dict[int, Tensor] = {}
        """By serial number, the one that has been spare the longest first."""
        self._serial = 0

    @property
    def num_bytes(self) -> int:
        """Of all buffers that are alive, spare ones included."""
        return self._alive.num_bytes

    @property
    def num_unpinned_bytes(self) -> int:
        """Of those that were to be pinned and are not."""
        return self._alive.num_unpinned_bytes

    def empty(self, num_bytes: int, *, gives_way: bool = False) -> Tensor:
        """uint8 [num_bytes], page-aligned. gives_way: may be unpinned later, for a buffer that may not."""
        assert num_bytes > 0
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return self.adopt(pages, gives_way=gives_way)

    def adopt(self, pages: mmap.mmap, *, gives_way: bool = False) -> Tensor:
        """The same over pages that are mapped already, those that ranks share (ranks.py). They stay mapped as
        long as the buffer or a view of it lives."""
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        self._alive.add(buffer, gives_way=gives_way)
        weakref.finalize(buffer.untyped_storage(), self._alive.remove, buffer.numel(), buffer.data_ptr())
        if self.num_unpinned_bytes and not self._was_refused:
            self._was_refused = True
            self._refused(self)
        return buffer

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether the device copies from this buffer, or this part of one, by itself."""
        return tensor.untyped_storage().data_ptr() in self._alive.pinned

    def copy_if_pinned(self, source: Tensor, target: Tensor) -> bool:
        """Queue a copy from (a part of) a buffer to the device on the current stream, if the device can do it
        by itself."""
        with self._alive.lock:
            is_pinned = self.is_pinned(source)
            if is_pinned:
                target.copy_(source, non_blocking=True)
        return is_pinned

    def borrow(self, num_bytes: int) -> Tensor:
        """uint8, at least num_bytes: pinning costs more than a copy, so buffers given back are used again.

        Sizes that follow the data differ from step to step. A spare buffer serves if it is at most a quarter
        too large; where none does, the one that has waited longest makes room.
        """
        at = bisect_left(self._spares, (num_bytes, 0))
        if at < len(self._spares) and self._spares[at][0] <= num_bytes + num_bytes // 4:
            return self._spare_buffers.pop(self._spares.pop(at)[1])
        if self._spares:
            self._device.wait()  # a copy from it may still be under way; rare, because sizes settle
            serial = next(iter(self._spare_buffers))
            self._spares.remove((self._spare_buffers.pop(serial).numel(), serial))
        return self.empty(num_bytes)

    def give_back(self, buffer: Tensor) -> None:
        """For a later `borrow`."""
        self._serial += 1
        insort(self._spares, (buffer.numel(), self._serial))
        self._spare_buffers[self._serial] = buffer


class _Alive:
    """Which buffers there are, and which of them are pinned. Holds none of them: what runs when a buffer goes
    refers to this object, not to `HostMemory`, which would live as long as its last buffer."""

    def __init__(self, device: ComputeDevice) -> None:
        self._device = device
        self.lock = RLock()
        """A buffer may go, and `remove` be called, wherever Python collects garbage, also inside."""
        self.num_bytes = self.num_unpinned_bytes = 0
        self.pinned: dict[int, int] = {}
        """Address -> bytes."""
        self._giving_way: list[int] = []

    def add(self, buffer: Tensor, *, gives_way: bool) -> None:
        address, num_bytes = buffer.data_ptr(), buffer.numel()
        is_pinned = self._device.is_accelerator and self._pin(buffer, gives_way=gives_way)
        with self.lock:
            self.num_bytes += num_bytes
            if is_pinned:
                self.pinned[address] = num_bytes
                if gives_way:
                    self._giving_way.append(address)
            elif self._device.is_accelerator:
                self.num_unpinned_bytes += num_bytes

    def remove(self, num_bytes: int, address: int) -> None:
        with self.lock:
            self.num_bytes -= num_bytes
            if self.pinned.pop(address, None) is not None:
                self._device.unpin(address)
                if address in self._giving_way:
                    self._giving_way.remove(address)
            elif self._device.is_accelerator:
                self.num_unpinned_bytes -= num_bytes

    def _pin(self, buffer: Tensor, *, gives_way: bool) -> bool:
        """Ask, and ask again as long as there are weights that give way."""
        while not self._device.pin(buffer):
            if gives_way or not self._unpin_last():
                return False
        return True

    def _unpin_last(self) -> bool:
        with self.lock:
            if not self._giving_way:
                return False
            self._device.wait()  # a copy from it may still be under way
            address = self._giving_way.pop()
            self._device.unpin(address)
            self.num_unpinned_bytes += self.pinned.pop(address)
            return True
