"""Uploads the host's tensors of every micro-batch (token ids, embedding rows) to the device.

The host fills a pinned buffer, queues a copy on the current stream, and does not wait. A buffer is reused
once its copy is done (an event); until then the next upload takes another, so there are as many buffers as
copies under way at once. Several tensors share one buffer and one copy: a micro-batch has ten small ones, and
each copy costs some microseconds to queue. Bytes: the tensors sent, each rounded up to 256.

Without an accelerator nothing is copied: the staged tensors are used as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice, Event
from qlora_train.units import round_up
from qlora_train.weights.host_memory import HostMemory

PIECE_ALIGNMENT_BYTES = 256
LEAST_BUFFER_BYTES = 4096


@dataclass(frozen=True)
class Staged:
    """Tensors in host memory, to be sent once. buffer: the pinned one; None without an accelerator."""

    tensors: tuple[Tensor, ...]
    buffer: Tensor | None
    num_bytes: int


class Uploads:
    """Stages tensors in pinned buffers and sends them to the device. Thread-safe: a staged buffer is not
    reused before it is sent, so training's batches can be made ahead during an evaluation. host: allocates
    buffers."""

    def __init__(self, device: ComputeDevice, host: HostMemory) -> None:
        self.device, self._host = device, host
        self._lock = Lock()
        self._buffers: list[Tensor] = []
        self._under_way: dict[int, Event] = {}
        """Address of a buffer -> event after its copy."""
        self._staged: set[int] = set()

    def stage(self, tensors: Sequence[Tensor]) -> Staged:
        """Copy host tensors into one pinned buffer."""
        if not self.device.is_accelerator:
            return Staged(tuple(tensors), None, 0)
        num_bytes = sum(map(_aligned_bytes, tensors))
        buffer = self._free_buffer(max(num_bytes, LEAST_BUFFER_BYTES))
        parts = _parts_of(buffer, tensors)
        for part, tensor in zip(parts, tensors, strict=True):
            part.copy_(tensor)
        return Staged(tuple(parts), buffer, num_bytes)

    def stage_rows(self, num_rows: int, row_bytes: int, fill: Callable[[Tensor], None]) -> Staged:
        """Stage rows that `fill` writes into a host tensor, uint8 [num_rows, row_bytes]."""
        if not self.device.is_accelerator:
            rows = torch.empty(num_rows, row_bytes, dtype=torch.uint8)
            fill(rows)
            return Staged((rows,), None, 0)
        num_bytes = num_rows * row_bytes
        buffer = self._free_buffer(max(num_bytes, LEAST_BUFFER_BYTES))
        rows = buffer[:num_bytes].view(num_rows, row_bytes)
        fill(rows)
        return Staged((rows,), buffer, num_bytes)

    def send(self, staged: Staged) -> list[Tensor]:
        """Queue the copy on the current stream; returns the tensors on the device."""
        if staged.buffer is None:
            return list(staged.tensors)
        address = staged.buffer.data_ptr()
        try:
            there = torch.empty(staged.num_bytes, dtype=torch.uint8, device=self.device.torch)
            there.copy_(staged.buffer[: staged.num_bytes], non_blocking=True)
            copied = self.device.event()
            with self._lock:
                self._under_way[address] = copied
        finally:  # also when out of memory: the buffer can be reused
            with self._lock:
                self._staged.discard(address)
        return _parts_of(there, staged.tensors)

    def _free_buffer(self, num_bytes: int) -> Tensor:
        """A free buffer of 1 to 4 times num_bytes, the smallest; else a new one, replacing a free one if
        any."""
        with self._lock:
            free = [b for b in self._buffers if self._is_free(b)]
            fitting = [b for b in free if num_bytes <= b.numel() <= 4 * num_bytes]
            if fitting:
                buffer = min(fitting, key=Tensor.numel)
            else:
                if free:
                    self._forget(free[0])
                buffer = self._host.empty(num_bytes)
                self._buffers.append(buffer)
            self._staged.add(buffer.data_ptr())
            return buffer

    def _is_free(self, buffer: Tensor) -> bool:
        address = buffer.data_ptr()
        copied = self._under_way.get(address)
        return address not in self._staged and (copied is None or copied.query())

    def _forget(self, buffer: Tensor) -> None:
        self._buffers = [b for b in self._buffers if b is not buffer]
        self._under_way.pop(buffer.data_ptr(), None)


def _aligned_bytes(tensor: Tensor) -> int:
    return round_up(tensor.nbytes, PIECE_ALIGNMENT_BYTES)


def _parts_of(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a uint8 buffer, shaped like `tensors`, one after another."""
    parts, start = [], 0
    for tensor in tensors:
        flat = buffer[start : start + tensor.nbytes].view(tensor.dtype)
        parts.append(flat.view(tensor.shape))
        start += _aligned_bytes(tensor)
    return parts
