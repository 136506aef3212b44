"""A head that stays quantized: rows of codes with their own scales, dequantized a tile or a few labels at a
time.

QLoRA keeps the head in 16 bits, and bitsandbytes leaves it so unless it is told what else to skip
(`llm_int8_skip_modules`). A checkpoint whose head was quantized all the same has lost the 16-bit rows:
dequantizing them at load would cost their bytes and bring nothing back. Here a row of D numbers is stored as
one piece,

    nf4, fp4    D/2 bytes of codes, then D/block_size absmax in fp32
    int8        D bytes of codes, then row_absmax in fp32

so a quantized head is a uint8 matrix [V, row bytes], which lies on the device, waits in RAM or a file, is
gathered and passes the ring like any other (vocab_matrix.py, weights/streaming.py). `QuantizedMatrix` around
it dequantizes on the device. The numbers are those of dequantizing the whole matrix, bit for bit.

Bytes for Llama 3.1 8B (V = 128,256, D = 4,096): 296 MB in 4 bits or 526 MB in int8, against 1,051 MB in 16
bits, on the device or through the ring; and 34 MB for the dequantized tile of 4,096 rows, in one buffer that
every tile uses. Double quantization of the scales is undone when they are read, since its blocks of 256
scales do not end with a row: 0.5625 byte per number where the checkpoint has 0.5159, 24 MB here.

Where 4-bit blocks do not end with a row either (D no multiple of the block size) the head is dequantized at
load instead (checkpoint.py). No known model has such a D.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_train.device.description import DequantizeKernel
from qlora_train.model.vocab_matrix import TokenIds, VocabMatrix
from qlora_train.quant.formats import Quantization
from qlora_train.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class RowLayout:
    """How a row of num_columns numbers is stored. quantization: of `Quantization.by_row`. dtype: of its
    numbers, dequantized."""

    quantization: Quantization
    num_columns: int
    dtype: torch.dtype

    @property
    def is_quantized(self) -> bool:
        return self.quantization.is_quantized

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the stored matrix."""
        return torch.uint8 if self.is_quantized else self.dtype

    @property
    def stored_columns(self) -> int:
        """Of the stored matrix: bytes of a quantized row, numbers of another."""
        return self.row_bytes // self.stored_dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.quantization.row_bytes(self.num_columns, self.dtype.itemsize)

    @property
    def _code_bytes(self) -> int:
        return self.quantization.row_code_bytes(self.num_columns)

    def store(self, weight: QuantizedWeight, start: int, stop: int) -> Tensor:
        """Rows start..stop of a quantized weight as they are stored, uint8 [stop - start, stored_columns]."""
        assert self.is_quantized and weight.shape[1] == self.num_columns
        codes = weight.tensors["data"].view(weight.shape[0], -1)[start:stop].view(torch.uint8)
        if self.quantization.is_4bit:
            per_row = self.num_columns // self.quantization.block_size
            scales = weight.block_absmax(start * per_row, stop * per_row)
        else:
            scales = weight.tensors["row_absmax"][start:stop]
        return torch.cat([codes, scales.reshape(stop - start, -1).view(torch.uint8)], dim=1)

    def quantized(self, rows: Tensor) -> QuantizedWeight:
        """Stored rows uint8 [n, stored_columns] as a quantized weight [n, num_columns] of its own."""
        codes = rows[:, : self._code_bytes].contiguous()
        scales = rows[:, self._code_bytes :].clone(memory_format=torch.contiguous_format)  # aligned as fp32
        scales = scales.view(torch.float32).view(-1)
        shape = (len(rows), self.num_columns)
        if self.quantization.is_4bit:
            return QuantizedWeight(self.quantization, shape, {"data": codes.view(-1), "absmax": scales})
        return QuantizedWeight(
            self.quantization, shape, {"data": codes.view(torch.int8), "row_absmax": scales}
        )


class QuantizedMatrix:
    """A `VocabMatrix` [V, D] over another one, [V, stored_columns], that holds its rows as `row_format` says.

    A tile is valid while its context lasts: the next is dequantized into the same buffer.
    """

    def __init__(
        self, stored: VocabMatrix, row_format: RowLayout, dequantize_kernel: DequantizeKernel
    ) -> None:
        self._stored, self._format, self._dequantize_kernel = stored, row_format, dequantize_kernel
        self.num_rows, self.tile_rows, self.items = stored.num_rows, stored.tile_rows, stored.items
        self._buffer: Tensor | None = None

    def gather(self, ids: TokenIds) -> Tensor:
        return self._format.quantized(self._stored.gather(ids)).dequantize(self._format.dtype)

    @contextmanager
    def tile(self, index: int) -> Iterator[Tensor]:
        with self._stored.tile(index) as rows:
            dequantized = self._dequantize(rows)
        yield dequantized

    def _dequantize(self, rows: Tensor) -> Tensor:
        if self._buffer is None:
            shape = (min(self.tile_rows, self.num_rows), self._format.num_columns)
            self._buffer = torch.empty(shape, dtype=self._format.dtype, device=rows.device)
        return self._format.quantized(rows).dequantize_into(
            self._buffer[: len(rows)], self._dequantize_kernel
        )


def as_vocab_matrix(
    stored: VocabMatrix, row_format: RowLayout, dequantize_kernel: DequantizeKernel
) -> VocabMatrix:
    """A stored matrix as one of numbers. dequantize_kernel: of the device."""
    return QuantizedMatrix(stored, row_format, dequantize_kernel) if row_format.is_quantized else stored
