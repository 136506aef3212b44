"""What the host makes for every micro-batch (token ids, embedding rows) on its way to the device.

The host fills a pinned buffer, a copy is queued on the current stream, and nobody waits. The buffer serves
again once its copy is done, which an event tells; until then the next takes another, so there are as many as
copies are ever under way at once. Several tensors go in one buffer and one copy: a micro-batch has ten small
ones, and each copy costs some microseconds to queue. Bytes: what is sent, each tensor rounded up to 256.

Without an accelerator there is nothing to copy: what was staged is what is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice, Event
from qlora_train.weights.host_memory import HostMemory

PIECE_ALIGNMENT_BYTES = 256
LEAST_BUFFER_BYTES = 4096


@dataclass(frozen=True)
class Staged:
    """Tensors in host memory, to be sent once. buffer: None where they stay as they are."""

    tensors: tuple[Tensor, ...]
    buffer: Tensor | None
    num_bytes: int


class Uploads:
    """Any threads stage and send, what each of them has staged being its own until it is sent: training's
    batches are made ahead while those of an evaluation are. host: for the buffers."""

    def __init__(self, device: ComputeDevice, host: HostMemory) -> None:
        self._device, self._host = device, host
        self._lock = Lock()
        self._buffers: list[Tensor] = []
        self._under_way: dict[int, Event] = {}
        """Address of a buffer -> when its copy is done."""
        self._staged: set[int] = set()

    def stage(self, tensors: Sequence[Tensor]) -> Staged:
        """Copy tensors of the host into one pinned buffer."""
        if not self._device.is_accelerator:
            return Staged(tuple(tensors), None, 0)
        num_bytes = sum(map(_aligned_bytes, tensors))
        buffer = self._free_buffer(max(num_bytes, LEAST_BUFFER_BYTES))
        parts = _parts_of(buffer, tensors)
        for part, tensor in zip(parts, tensors, strict=True):
            part.copy_(tensor)
        return Staged(tuple(parts), buffer, num_bytes)

    def stage_rows(self, num_rows: int, row_bytes: int, fill: Callable[[Tensor], None]) -> Staged:
        """fill: writes them, uint8 [num_rows, row_bytes]."""
        if not self._device.is_accelerator:
            rows = torch.empty(num_rows, row_bytes, dtype=torch.uint8)
            fill(rows)
            return Staged((rows,), None, 0)
        num_bytes = num_rows * row_bytes
        buffer = self._free_buffer(max(num_bytes, LEAST_BUFFER_BYTES))
        rows = buffer[:num_bytes].view(num_rows, row_bytes)
        fill(rows)
        return Staged((rows,), buffer, num_bytes)

    def send(self, staged: Staged) -> list[Tensor]:
        """The tensors on the device, their copy queued on the current stream."""
        if staged.buffer is None:
            return list(staged.tensors)
        address = staged.buffer.data_ptr()
        try:
            there = torch.empty(staged.num_bytes, dtype=torch.uint8, device=self._device.torch)
            there.copy_(staged.buffer[: staged.num_bytes], non_blocking=True)
            self._under_way[address] = self._device.event()
        finally:  # where there is no memory, the buffer serves again
            self._staged.discard(address)
        return _parts_of(there, staged.tensors)

    def _free_buffer(self, num_bytes: int) -> Tensor:
        """One whose copy is done, at most four times too large; else a new one in place of a free one."""
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
    return -(-tensor.nbytes // PIECE_ALIGNMENT_BYTES) * PIECE_ALIGNMENT_BYTES


def _parts_of(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a uint8 buffer, shaped like `tensors`, one after another."""
    parts, start = [], 0
    for tensor in tensors:
        flat = buffer[start : start + tensor.nbytes].view(tensor.dtype)
        parts.append(flat.view(tensor.shape))
        start += _aligned_bytes(tensor)
    return parts
