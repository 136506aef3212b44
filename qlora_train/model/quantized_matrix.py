"""A quantized head: rows of codes with their own scales, dequantized by tile or by gathered rows.

QLoRA keeps the head in 16 bits, as bitsandbytes does unless `llm_int8_skip_modules` names other modules. If a
checkpoint's head is quantized all the same, dequantizing it at load would cost the bytes of 16-bit rows and
restore no precision. Here each row of D numbers is stored contiguously,

    nf4, fp4    D/2 bytes of codes, then D/block_size absmax in fp32
    int8        D bytes of codes, then row_absmax in fp32

so a quantized head is a uint8 matrix [V, row_bytes] that is stored on the device, in RAM or in a file,
gathered, and streamed through the ring like any other (vocab_matrix.py, weights/streaming.py).
`QuantizedMatrix` dequantizes its rows on the device. The result is that of dequantizing the whole matrix, bit
for bit.

Bytes for Llama 3.1 8B (V = 128,256, D = 4,096): 296 MB in 4 bits or 526 MB in int8, against 1,051 MB in 16
bits, on the device or through the ring; plus 34 MB for one dequantized tile of 4,096 rows, in a buffer that
all tiles share. Double quantization of the scales is undone at load, since its blocks of 256 scales do not
align with rows: 0.5625 byte per number instead of the checkpoint's 0.5159, 24 MB here.

If the 4-bit blocks do not align with rows either (D no multiple of the block size), the head is dequantized
at load (weights/base_checkpoint.py). No known model has such a D.
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
    """How a row of `num_columns` numbers is stored. quantization: one of `Quantization.by_row`. dtype: that
    of the dequantized numbers."""

    quantization: Quantization
    num_columns: int
    dtype: torch.dtype

    @property
    def is_quantized(self) -> bool:
        return self.quantization.is_quantized

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the stored matrix: uint8 if quantized."""
        return torch.uint8 if self.is_quantized else self.dtype

    @property
    def stored_columns(self) -> int:
        """Columns of the stored matrix: bytes of a quantized row, numbers of an unquantized one."""
        return self.row_bytes // self.stored_dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.quantization.row_bytes(self.num_columns, self.dtype.itemsize)

    @property
    def _code_bytes(self) -> int:
        return self.quantization.row_code_bytes(self.num_columns)

    def store(self, weight: QuantizedWeight, start: int, stop: int) -> Tensor:
        """Rows start..stop of a quantized weight in this layout, uint8 [stop - start, stored_columns]."""
        assert self.is_quantized and weight.shape[1] == self.num_columns
        codes = weight.tensors["data"].view(weight.shape[0], -1)[start:stop].view(torch.uint8)
        if self.quantization.is_4bit:
            per_row = self.num_columns // self.quantization.block_size
            scales = weight.block_absmax(start * per_row, stop * per_row)
        else:
            scales = weight.tensors["row_absmax"][start:stop]
        return torch.cat([codes, scales.reshape(stop - start, -1).view(torch.uint8)], dim=1)

    def quantized(self, rows: Tensor) -> QuantizedWeight:
        """A quantized weight [n, num_columns] from stored rows uint8 [n, stored_columns]."""
        codes = rows[:, : self._code_bytes].contiguous()
        scales = rows[:, self._code_bytes :].clone(memory_format=torch.contiguous_format)  # aligned for fp32
        scales = scales.view(torch.float32).view(-1)
        shape = (len(rows), self.num_columns)
        if self.quantization.is_4bit:
            return QuantizedWeight(self.quantization, shape, {"data": codes.view(-1), "absmax": scales})
        return QuantizedWeight(
            self.quantization, shape, {"data": codes.view(torch.int8), "row_absmax": scales}
        )


class QuantizedMatrix:
    """A `VocabMatrix` [V, D] that dequantizes `stored`, a uint8 matrix [V, stored_columns] in `row_format`.

    A tile is valid within its context only: the next is dequantized into the same buffer.
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
    """The matrix [V, D] of numbers over a stored one: a `QuantizedMatrix` if rows are quantized, else
    `stored` itself. dequantize_kernel: of the device."""
    return QuantizedMatrix(stored, row_format, dequantize_kernel) if row_format.is_quantized else stored
