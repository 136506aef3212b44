"""A head that stays packed: rows of codes with their own scales, unpacked a tile or a few labels at a time.

QLoRA keeps the head in 16 bits, and bitsandbytes leaves it so unless it is told what else to skip
(`llm_int8_skip_modules`). A checkpoint whose head was packed all the same has lost the 16-bit rows: unpacking
them at load would cost their bytes and bring nothing back. Here a row of D numbers is stored as one piece,

    nf4, fp4    D/2 bytes of codes, then D/block_size absmax in fp32
    int8        D bytes of codes, then row_absmax in fp32

so a packed head is a uint8 matrix [V, row bytes], which lies on the device, waits in RAM or a file, is
gathered and passes the ring like any other (token_matrix.py, memory/streaming.py). `PackedMatrix` around it
unpacks on the device. The numbers are those of unpacking the whole matrix, bit for bit.

Bytes for Llama 3.1 8B (V = 128,256, D = 4,096): 296 MB in 4 bits or 526 MB in int8, against 1,051 MB in 16
bits, on the device or through the ring; and 34 MB for the unpacked tile of 4,096 rows, in one buffer that
every tile uses. Double quantisation of the scales is undone when they are read, since its blocks of 256
scales do not end with a row: 0.5625 byte per number where the checkpoint has 0.5159, 24 MB here.

Where 4-bit blocks do not end with a row either (D no multiple of the block size) the head is unpacked at load
instead (checkpoint.py). No known model has such a D.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_train.device.description import UnpackKernel
from qlora_train.model.quantize import PackedWeight, Packing
from qlora_train.model.token_matrix import TokenIds, TokenMatrix

UNPACKED = Packing("none")
SCALE_BYTES = 4


def packing_of_rows(packing: Packing, num_columns: int) -> Packing:
    """How rows of a matrix that is packed so can be stored one by one; `UNPACKED` where they cannot."""
    if packing.is_4bit and num_columns % packing.block_size != 0:
        return UNPACKED
    return replace(packing, double_quant=False)


@dataclass(frozen=True)
class RowFormat:
    """How a row of num_columns numbers is stored. packing: of `packing_of_rows`. dtype: of its numbers,
    unpacked."""

    packing: Packing
    num_columns: int
    dtype: torch.dtype

    @property
    def is_packed(self) -> bool:
        return self.packing.format != "none"

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the stored matrix."""
        return torch.uint8 if self.is_packed else self.dtype

    @property
    def stored_columns(self) -> int:
        """Of the stored matrix: bytes of a packed row, numbers of another."""
        if not self.is_packed:
            return self.num_columns
        num_scales = self.num_columns // self.packing.block_size if self.packing.is_4bit else 1
        return self._code_bytes + SCALE_BYTES * num_scales

    @property
    def row_bytes(self) -> int:
        return self.stored_columns * self.stored_dtype.itemsize

    @property
    def _code_bytes(self) -> int:
        return self.num_columns // 2 if self.packing.is_4bit else self.num_columns

    def store(self, weight: PackedWeight, start: int, stop: int) -> Tensor:
        """Rows start..stop of a packed weight as they are stored, uint8 [stop - start, stored_columns]."""
        assert self.is_packed and weight.shape[1] == self.num_columns
        codes = weight.tensors["data"].view(weight.shape[0], -1)[start:stop].view(torch.uint8)
        if self.packing.is_4bit:
            per_row = self.num_columns // self.packing.block_size
            scales = weight.block_absmax(start * per_row, stop * per_row)
        else:
            scales = weight.tensors["row_absmax"][start:stop]
        return torch.cat([codes, scales.reshape(stop - start, -1).view(torch.uint8)], dim=1)

    def packed(self, rows: Tensor) -> PackedWeight:
        """Stored rows uint8 [n, stored_columns] as a packed weight [n, num_columns] of its own."""
        codes = rows[:, : self._code_bytes].contiguous()
        scales = rows[:, self._code_bytes :].clone(memory_format=torch.contiguous_format)  # aligned as fp32
        scales = scales.view(torch.float32).view(-1)
        shape = (len(rows), self.num_columns)
        if self.packing.is_4bit:
            return PackedWeight(self.packing, shape, {"data": codes.view(-1), "absmax": scales})
        return PackedWeight(self.packing, shape, {"data": codes.view(torch.int8), "row_absmax": scales})


class PackedMatrix:
    """A `TokenMatrix` [V, D] over another one, [V, stored_columns], that holds its rows as `row_format` says.

    A tile is valid while its context lasts: the next is unpacked into the same buffer.
    """

    def __init__(self, stored: TokenMatrix, row_format: RowFormat, unpack_kernel: UnpackKernel) -> None:
        self._stored, self._format, self._unpack_kernel = stored, row_format, unpack_kernel
        self.num_rows, self.tile_rows, self.items = stored.num_rows, stored.tile_rows, stored.items
        self._buffer: Tensor | None = None

    def gather(self, ids: TokenIds) -> Tensor:
        return self._format.packed(self._stored.gather(ids)).unpack(self._format.dtype)

    @contextmanager
    def tile(self, index: int) -> Iterator[Tensor]:
        with self._stored.tile(index) as rows:
            unpacked = self._unpack(rows)
        yield unpacked

    def _unpack(self, rows: Tensor) -> Tensor:
        if self._buffer is None:
            shape = (min(self.tile_rows, self.num_rows), self._format.num_columns)
            self._buffer = torch.empty(shape, dtype=self._format.dtype, device=rows.device)
        return self._format.packed(rows).unpack_into(self._buffer[: len(rows)], self._unpack_kernel)


def as_token_matrix(stored: TokenMatrix, row_format: RowFormat, unpack_kernel: UnpackKernel) -> TokenMatrix:
    """A stored matrix as one of numbers. unpack_kernel: of the device."""
    return PackedMatrix(stored, row_format, unpack_kernel) if row_format.is_packed else stored
