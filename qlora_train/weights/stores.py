"""Sources of streamed weights, RAM or a file, and their copies to the device.

    RAM  -> device    one copy from pinned host memory
    file -> device    reads of up to 16 MiB into two pinned staging pieces in turn, each copied on while the
                      next is read; without a GPU straight into the slot

RAM that the system refused to pin goes through the staging pieces too: the host copies what the driver would
have copied, but waits for one piece at a time only, and the device never waits for the host. If even the
pieces are not pinned, the driver copies.

Files are read in large parts, bypassing the page cache (disk_file.py). A memory map would page-fault 4 KB at
a time, and every page it touched would count as this process's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice, Event
from qlora_train.weights.disk_file import DiskFile
from qlora_train.weights.host_memory import HostMemory

STAGING_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FilePart:
    """A part of a file: num_bytes from offset_bytes on."""

    path: Path
    offset_bytes: int
    num_bytes: int


class ItemReader:
    """The `Reader` of a ring (ring.py): each item is a part of a file or a buffer in RAM.

    num_bytes_read: bytes copied into slots so far.
    """

    def __init__(self, device: ComputeDevice, host: HostMemory) -> None:
        self._host = host
        self.items: dict[int, Tensor | FilePart] = {}
        self.num_bytes_read = 0
        self._files: dict[Path, DiskFile] = {}
        self._staging = _Staging(device, host) if device.is_accelerator else None

    @property
    def largest_bytes(self) -> int:
        return max((_size(item) for item in self.items.values()), default=0)

    def read(self, item: int, slot: Tensor) -> None:
        """Fill the beginning of `slot` with the item."""
        source = self.items[item]
        self.copy(source, slot[: _size(source)])
        self.num_bytes_read += _size(source)

    def copy(self, source: Tensor | FilePart, target: Tensor) -> None:
        """Fill `target` (uint8, on the device) from a part of a file or a buffer in RAM."""
        if isinstance(source, FilePart):
            if self._staging is None:
                self.read_to_host(source, target)
            else:
                file, origin = self._file(source.path), source.offset_bytes
                self._staging.copy(lambda start, piece: file.read(origin + start, piece), target)
        elif self._staging is None:
            target.copy_(source)
        elif self._host.copy_if_pinned(source, target):
            return
        elif not self._staging.is_pinned:
            target.copy_(source, non_blocking=True)
        else:
            self._staging.copy(lambda start, piece: piece.copy_(source[start : start + len(piece)]), target)

    def read_to_host(self, part: FilePart, target: Tensor) -> None:
        """Fill `target` (uint8, on the host) from a part of a file."""
        self._file(part.path).read(part.offset_bytes, target)

    def _file(self, path: Path) -> DiskFile:
        if path not in self._files:
            self._files[path] = DiskFile(path)
        return self._files[path]

    def finish(self) -> None:
        """Wait on the host for every copy so far; their sources may be freed afterwards."""
        if self._staging is not None:
            self._staging.finish()

    def close(self) -> None:
        self.finish()
        for file in self._files.values():
            file.close()


class _Staging:
    """Two pinned host buffers ("pieces") of STAGING_BYTES, used in turn for copies to the device."""

    def __init__(self, device: ComputeDevice, host: HostMemory) -> None:
        self._device = device
        self._pieces = [host.empty(STAGING_BYTES) for _ in range(2)]
        self._copied: list[Event | None] = [None, None]
        self.is_pinned = all(host.is_pinned(piece) for piece in self._pieces)

    def copy(self, fill: Callable[[int, Tensor], object], target: Tensor) -> None:
        """Fill `target` on the device. fill(start, piece): writes its bytes from `start` on into a piece."""
        for number, start in enumerate(range(0, target.numel(), STAGING_BYTES)):
            part = target[start : start + STAGING_BYTES]
            piece, copied = self._pieces[number % 2][: part.numel()], self._copied[number % 2]
            if copied is not None:
                copied.synchronize()  # what this piece held is on the device
            fill(start, piece)
            part.copy_(piece, non_blocking=True)
            self._copied[number % 2] = self._device.event()

    def finish(self) -> None:
        for copied in self._copied:
            if copied is not None:
                copied.synchronize()


def _size(source: Tensor | FilePart) -> int:
    return source.numel() if isinstance(source, Tensor) else source.num_bytes


class HostRows:
    """The rows of a [V, D] matrix in RAM or in a file, gathered on the host."""

    def __init__(self, source: Tensor | FilePart, row_bytes: int) -> None:
        self._source, self.row_bytes = source, row_bytes
        self._file = None if isinstance(source, Tensor) else DiskFile(source.path)

    def gather(self, ids: np.ndarray, rows: Tensor) -> None:
        """Copy the rows of n ids into `rows`, uint8 [n, row bytes] on the host."""
        if isinstance(self._source, Tensor):
            torch.index_select(self._source.view(-1, self.row_bytes), 0, torch.from_numpy(ids), out=rows)
            return
        assert self._file is not None
        unique, where = np.unique(ids, return_inverse=True)
        unique_rows = torch.empty(len(unique), self.row_bytes, dtype=torch.uint8)
        for row, token in zip(unique_rows, unique.tolist(), strict=True):
            self._file.read(self._source.offset_bytes + token * self.row_bytes, row)
        torch.index_select(unique_rows, 0, torch.from_numpy(where), out=rows)


def tile_items(
    source: Tensor | FilePart, row_bytes: int, tile_rows: int, first_item: int
) -> Mapping[int, Tensor | FilePart]:
    """The tiles of a matrix as ring items, numbered from first_item on."""
    num_bytes, tile_bytes = _size(source), tile_rows * row_bytes
    items: dict[int, Tensor | FilePart] = {}
    for number, start in enumerate(range(0, num_bytes, tile_bytes)):
        size = min(tile_bytes, num_bytes - start)
        items[first_item + number] = (
            source[start : start + size]
            if isinstance(source, Tensor)
            else FilePart(source.path, source.offset_bytes + start, size)
        )
    return items
