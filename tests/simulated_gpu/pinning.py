"""Pinned (page-locked) host memory: what `torch.sim.cudart()` registers, refuses and forgets.

As the CUDA runtime, `cudaHostRegister` returns its error instead of raising it, and keeps it for the calling
thread: the next kernel launch, whatever that is, raises it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from enum import IntEnum

from torch import Tensor

from simulated_gpu.simulation import device_at, running


class Status(IntEnum):
    """`cudaError` of the CUDA runtime, with its names and numbers."""

    success = 0
    invalidValue = 1
    memoryAllocation = 2
    hostMemoryAlreadyRegistered = 712
    hostMemoryNotRegistered = 713


_TEXTS = {
    Status.success: "no error",
    Status.invalidValue: "invalid argument",
    Status.memoryAllocation: "out of memory",
    Status.hostMemoryAlreadyRegistered: "part or all of the requested memory range is already mapped",
    Status.hostMemoryNotRegistered: "pointer does not correspond to a registered memory region",
}


@dataclass
class Refusals:
    """What the system refuses to pin: all, what goes beyond some bytes, or single blocks."""

    every: bool = False
    beyond_bytes: int | None = None
    blocks: frozenset[int] = frozenset()
    """Numbers of the registrations that are refused, from 1 since these were set."""
    num_asked: int = 0

    def refuse(self, num_bytes: int, pinned_bytes: int) -> bool:
        self.num_asked += 1
        too_much = self.beyond_bytes is not None and pinned_bytes + num_bytes > self.beyond_bytes
        return self.every or too_much or self.num_asked in self.blocks


@dataclass
class PinnedRanges:
    """Registered memory, by address."""

    refusals: Refusals = field(default_factory=Refusals)
    num_refused: int = 0
    _starts: list[int] = field(default_factory=list)
    _bytes: dict[int, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(self._bytes.values())

    def register(self, address: int, num_bytes: int) -> Status:
        if address == 0 or num_bytes <= 0:
            return Status.invalidValue
        position = bisect_right(self._starts, address)
        reaches_next = position < len(self._starts) and self._starts[position] < address + num_bytes
        if reaches_next or self._base(address) is not None:
            return Status.hostMemoryAlreadyRegistered
        if self.refusals.refuse(num_bytes, self.num_bytes):
            self.num_refused += 1
            return Status.memoryAllocation
        self._starts.insert(position, address)
        self._bytes[address] = num_bytes
        return Status.success

    def unregister(self, address: int) -> Status:
        if address not in self._bytes:
            return Status.hostMemoryNotRegistered
        del self._bytes[address]
        self._starts.remove(address)
        return Status.success

    def range_of(self, tensor: Tensor) -> int | None:
        """Where the registered range begins that all of the tensor lies in; None if it is pageable."""
        base = self._base(tensor.data_ptr())
        if base is None or tensor.data_ptr() + tensor.nbytes > base + self._bytes[base]:
            return None
        return base

    def _base(self, address: int) -> int | None:
        position = bisect_right(self._starts, address) - 1
        if position < 0:
            return None
        base = self._starts[position]
        return base if address < base + self._bytes[base] else None

    def leave(self) -> None:
        """The simulation ends. What is still registered may be unregistered later, when its memory goes."""
        _left_over.update(self._starts)


_left_over: set[int] = set()


class Runtime:
    """What `torch.cuda.cudart()` returns, as far as it is for memory."""

    cudaError = Status

    @staticmethod
    def cudaGetErrorString(error: Status) -> str:
        return _TEXTS[error]

    @staticmethod
    def cudaHostRegister(pointer: int, size: int, flags: int) -> Status:
        simulation = running()
        with simulation.lock:
            return _kept(simulation.pinned.register(pointer, size))

    @staticmethod
    def cudaHostUnregister(pointer: int) -> Status:
        if pointer in _left_over:
            _left_over.remove(pointer)
            return Status.success
        simulation = running()
        with simulation.lock:
            error = simulation.pinned.unregister(pointer)
            if error is Status.success:
                simulation.hazards.unpin(pointer)
            return _kept(error)

    @staticmethod
    def cudaMemGetInfo(device: int) -> tuple[int, int]:
        """(free, total) bytes: what the process has reserved is not free."""
        allocator = device_at(device).allocator
        return allocator.free_bytes, allocator.total_bytes


def _kept(error: Status) -> Status:
    """For the thread's next kernel launch to raise."""
    if error is not Status.success:
        running().thread.error = _TEXTS[error]
    return error
