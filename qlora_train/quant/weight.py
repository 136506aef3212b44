"""One quantized weight: its tensors, and dequantization of all of it or of some rows.

Dequantization uses bitsandbytes' functions, or on a GPU with Triton one launch of our own kernel
(quant/dequantize_4bit.py), with the same bits. Without a GPU it runs one cache-sized part at a time, since
the library's functions only return new tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_train.device.description import DequantizeKernel
from qlora_train.quant.formats import MXFP4, MXFP4_CODE, NESTED_BLOCK_SIZE, FormatName, Quantization
from qlora_train.units import ceil_div, round_up

DEQUANTIZE_ELEMENTS = 2**21  # numbers dequantized at once without a GPU
INT8_ELEMENTS = 2**20  # for int8, whose fp32 numbers are cast afterwards


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight [out, in], quantized. `tensors` are those of `quantized_layout`, all on one device."""

    quantization: Quantization
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> QuantizedWeight:
        """A copy of the weight on `device`, with the same bytes."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors.items()}
        return QuantizedWeight(self.quantization, self.shape, moved)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in] in `dtype`."""
        return self.dequantize_rows(0, self.shape[0], dtype)

    def dequantize_into(self, out: Tensor, kernel: DequantizeKernel, first_row: int = 0) -> Tensor:
        """`dequantize_rows(first_row, first_row + n, out.dtype)` written into `out` [n, in], contiguous;
        returns it.

        kernel: of the weight's device. 4 bits on a GPU: one launch of our kernel ("triton"), or of the
        library's ("library"), which can write into `out` if rows are whole blocks. Everything else runs one
        cache-sized part at a time, since the library's functions then only return new tensors."""
        if self.quantization.is_4bit and kernel == "triton":
            return out if out.is_meta else self._dequantize_in_one_launch(out, first_row)
        num_rows, columns, block = len(out), self.shape[1], self.quantization.block_size
        is_whole = self.quantization.is_4bit and columns % block == 0
        if is_whole and kernel == "library" and self.quantization != MXFP4:
            begin, end = first_row * columns, (first_row + num_rows) * columns
            if out.is_meta:  # of what the library's kernel takes, only absmax is written out
                self.block_absmax(begin // block, end // block)
                return out
            data = self.tensors["data"][begin // 2 : end // 2].unsqueeze(1)
            return bnb.dequantize_4bit(data, self._state(first_row, first_row + num_rows, out.dtype), out=out)
        step = max(1, DEQUANTIZE_ELEMENTS // columns)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            out[start:stop] = self.dequantize_rows(first_row + start, first_row + stop, out.dtype)
        return out

    def _dequantize_in_one_launch(self, out: Tensor, first_row: int) -> Tensor:
        from qlora_train.quant.dequantize_4bit import (  # imports Triton
            NestedScales,
            Quantized4bit,
            dequantize_4bit,
        )

        t, nested = self.tensors, None
        if self.quantization.double_quant:
            nested = NestedScales(t["nested_code"], t["nested_absmax"], t["nested_offset"])
        code = _code_on(self.quantization.format, out.device)
        quantized = Quantized4bit(t["data"], t["absmax"], code, self.quantization.block_size, nested)
        return dequantize_4bit(quantized, out, first_row * self.shape[1])

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start..stop of `dequantize(dtype)`, bit for bit: [stop - start, in]."""
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        if start == stop:
            return torch.empty(0, self.shape[1], dtype=dtype, device=self.tensors["data"].device)
        if self.quantization == MXFP4:
            return self._dequantize_mxfp4(start, stop, dtype)
        if self.quantization.is_4bit:
            return self._dequantize_4bit(start, stop, dtype)
        if self.quantization.format == "int8":
            return self._dequantize_int8(start, stop, dtype)
        return self.tensors["data"][start:stop].to(dtype)

    def _dequantize_4bit(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        columns = self.shape[1]
        begin, end = start * columns, stop * columns
        origin, limit = self._stored_range(begin, end)
        data = self.tensors["data"][origin // 2 : limit // 2].unsqueeze(1)
        flat = bnb.dequantize_4bit(data, self._state(start, stop, dtype)).reshape(-1)
        return flat[begin - origin : end - origin].reshape(stop - start, columns)

    def _dequantize_mxfp4(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """By a table of all pairs of codes: the library has no function for it. Exact in bfloat16."""
        columns, block = self.shape[1], self.quantization.block_size
        begin, end = start * columns, stop * columns
        pairs = self.tensors["data"][begin // 2 : end // 2]
        values = _mxfp4_pairs_on(pairs.device).index_select(0, pairs.int()).view(torch.float32)
        values = values.view(-1, block).mul_(self.block_absmax(begin // block, end // block)[:, None])
        return values.view(stop - start, columns).to(dtype)

    def _stored_range(self, begin: int, end: int) -> tuple[int, int]:
        """The range begin..end of flat numbers extended to whole blocks, within the stored numbers."""
        block = self.quantization.block_size
        num_stored = 2 * len(self.tensors["data"])  # n, or n + 1: the last byte's low nibble is then padding
        return begin // block * block, min(round_up(end, block), num_stored)

    def _state(self, start: int, stop: int, dtype: torch.dtype) -> bnb.QuantState:
        """The library's description of rows start..stop, with their absmax."""
        block, columns = self.quantization.block_size, self.shape[1]
        begin, end = start * columns, stop * columns
        origin, limit = self._stored_range(begin, end)
        # A matrix only if rows are whole blocks: else the library's CPU kernel reads the wrong absmax.
        as_matrix = columns % block == 0
        return bnb.QuantState(
            absmax=self.block_absmax(begin // block, ceil_div(end, block)),
            shape=torch.Size((stop - start, columns) if as_matrix else (1, limit - origin)),
            blocksize=block,
            quant_type=self.quantization.format,
            dtype=dtype,
        )

    def block_absmax(self, first_block: int, last_block: int) -> Tensor:
        """The absmax of 4-bit blocks first_block..last_block, fp32, with double quantization undone."""
        absmax = self.tensors["absmax"]
        if not self.quantization.double_quant:
            return absmax[first_block:last_block]
        nested_first = first_block // NESTED_BLOCK_SIZE
        origin = nested_first * NESTED_BLOCK_SIZE
        nested = bnb.QuantState(
            absmax=self.tensors["nested_absmax"][nested_first:],
            code=self.tensors["nested_code"],
            blocksize=NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        values = bnb.dequantize_blockwise(absmax[origin:last_block], nested)
        values += self.tensors["nested_offset"]
        return values[first_block - origin :]

    def _dequantize_int8(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        data, row_absmax = self.tensors["data"], self.tensors["row_absmax"]
        out = torch.empty(stop - start, self.shape[1], dtype=dtype, device=data.device)
        step = max(1, INT8_ELEMENTS // self.shape[1])
        for row in range(start, stop, step):
            rows = slice(row, min(row + step, stop))
            out[rows.start - start : rows.stop - start] = bnb.int8_vectorwise_dequant(
                data[rows], row_absmax[rows]
            )
        return out


@cache
def _code_on(form: FormatName, device: torch.device) -> Tensor:
    """float32 [16] on `device`: the numbers that the library dequantizes the 16 codes to there.

    The library has one table per device and another for quantizing, which differ in last bits; so its
    dequantization is called. It has none for mxfp4."""
    if form == "mxfp4":
        return torch.tensor(MXFP4_CODE, device=device)
    every_code = torch.tensor([[17 * even + 1] for even in range(0, 16, 2)], dtype=torch.uint8, device=device)
    ones = torch.ones(1, device=device)
    state = bnb.QuantState(ones, torch.Size((1, 16)), blocksize=64, quant_type=form, dtype=torch.float32)
    return bnb.dequantize_4bit(every_code, state).view(-1)


@cache
def _mxfp4_pairs_on(device: torch.device) -> Tensor:
    """[256] on `device`: for every byte its two float32 numbers, seen as one float64, which is gathered as
    fast as one of them."""
    code = torch.tensor(MXFP4_CODE, device=device)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1).view(torch.float64).view(-1)


def quantized_layout(
    quantization: Quantization, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a quantized weight [out, in]: name -> (dtype, shape). `dtype` is that of unquantized
    weights ("none")."""
    return {
        name: (dtype if kind is None else getattr(torch, kind), size)
        for name, (kind, size) in quantization.tensors(shape).items()
    }
