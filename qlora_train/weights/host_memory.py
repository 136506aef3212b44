"""Host buffers that the device copies from and to: exact in size, pinned where there is a GPU.

A copy between GPU and ordinary (pageable) memory goes through a staging buffer of the driver and makes the
host wait. Pinned pages are copied by the GPU alone, at the bus's full rate, while both keep computing.
torch's own pinned allocator rounds up to powers of two: a layer buffer of 113 MB would take 128, a head of
1.05 GB two. So pages come from the kernel (`mmap`) and are registered with the device's runtime as they are.

A system may refuse to pin (because of a container's limit on locked memory, for instance): one large block,
or every block beyond a total. Such buffers are pageable: slower, same results, and reported once (`refused`;
plan/unpinned.py estimates the cost). Pinning is tried again for each new buffer. Weights in RAM give way:
they can be copied through pinned staging pieces instead (stores.py), at nearly the same rate; offloaded
activations cannot. So where pinning is refused for such a buffer, weights are unpinned, the last first, until
it succeeds. Threads that copy weights check and queue the copy under one lock (`copy_if_pinned`): pages must
not be unregistered between the two, nor while the copy is under way.

No buffer comes from torch's allocator, so a meter of the compute device never counts it, even where that
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
    """Allocates host buffers of exact size, pinned for `device` where it is an accelerator. Any thread may
    call `empty` and `adopt`, one thread `borrow` and `give_back`."""

    def __init__(
        self, device: ComputeDevice, *, refused: Callable[[HostMemory], None] = lambda host: None
    ) -> None:
        """refused: called once, for the first buffer that stays pageable."""
        self._device, self._refused = device, refused
        self._was_refused = False
        self._alive = _Alive(device)
        self._spares: list[tuple[int, int]] = []
        """(bytes, serial number) of buffers given back, sorted."""
        self._spare_buffers: dict[int, Tensor] = {}
        """Serial number -> buffer, the one that has been spare the longest first."""
        self._serial = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all live buffers, spare ones included."""
        return self._alive.num_bytes

    @property
    def num_unpinned_bytes(self) -> int:
        """Bytes of the live buffers that should be pinned and are not."""
        return self._alive.num_unpinned_bytes

    def empty(self, num_bytes: int, *, gives_way: bool = False) -> Tensor:
        """A new buffer, uint8 [num_bytes], page-aligned. gives_way: it may be unpinned later in favour of a
        buffer that must be pinned."""
        assert num_bytes > 0
        pages = mmap.mmap(-1, num_bytes, access=mmap.ACCESS_COPY)  # private, on every system
        return self.adopt(pages, gives_way=gives_way)

    def adopt(self, pages: mmap.mmap, *, gives_way: bool = False) -> Tensor:
        """A buffer over pages that are mapped already, such as those that ranks share (ranks.py). They stay
        mapped as long as the buffer or a view of it lives. gives_way: see `empty`."""
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        self._alive.add(buffer, gives_way=gives_way)
        weakref.finalize(buffer.untyped_storage(), self._alive.remove, buffer.numel(), buffer.data_ptr())
        if self.num_unpinned_bytes and not self._was_refused:
            self._was_refused = True
            self._refused(self)
        return buffer

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a pinned buffer, which the device copies without the host."""
        return tensor.untyped_storage().data_ptr() in self._alive.pinned

    def copy_if_pinned(self, source: Tensor, target: Tensor) -> bool:
        """Queue a copy from (a part of) a buffer to the device on the current stream if it is pinned; returns
        whether it is."""
        with self._alive.lock:
            is_pinned = self.is_pinned(source)
            if is_pinned:
                target.copy_(source, non_blocking=True)
        return is_pinned

    def borrow(self, num_bytes: int) -> Tensor:
        """A buffer, uint8, of at least num_bytes. Pinning costs more than a copy, so returned buffers are
        reused.

        Sizes vary with the data from step to step. A spare buffer is reused if it is at most a quarter too
        large; if none is, the one that has been spare the longest is freed and a new one made.
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
        """Return a borrowed buffer, for a later `borrow`."""
        self._serial += 1
        insort(self._spares, (buffer.numel(), self._serial))
        self._spare_buffers[self._serial] = buffer


class _Alive:
    """The live buffers and which of them are pinned, by address. References no buffer. The finalizers of
    buffers reference this object, not `HostMemory`, which would otherwise live as long as its last buffer."""

    def __init__(self, device: ComputeDevice) -> None:
        self._device = device
        self.lock = RLock()
        """Re-entrant: garbage collection may free a buffer and call `remove` while this thread holds the
        lock."""
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
        """Try to pin; on refusal unpin buffers that give way, one at a time, and try again."""
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
