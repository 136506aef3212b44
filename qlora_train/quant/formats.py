"""The quantization formats: the tensors that store a weight [out, in]. Imports no torch.

4 bits (nf4, fp4). The weight is one flat row of n = out*in numbers, divided into blocks of 64. A block stores
its absolute maximum (fp32) and, per number, the index of the nearest of 16 code values to w / absmax:

    data    uint8 [ceil(n/2)]          two codes per byte, the first in the high nibble
    absmax  float32 [ceil(n/64)]       w = code[index] * absmax

Double quantization quantizes absmax too: minus its mean (nested_offset), in blocks of 256, as indices into a
table of 256 values:

    absmax  uint8 [ceil(n/64)]         absmax = nested_code[absmax] * nested_absmax + nested_offset
    nested_absmax float32 [ceil(n/64/256)], nested_offset float32 [], nested_code float32 [256]

That is (4 + 8/64 + 32/(64*256)) / 8 = 0.5159 byte per number, against 0.5625 without it.

mxfp4, as published (gpt_oss): weights are kept so, never quantized to it here. The 16 values are those of a
4-bit float (e2m1), and a block of 32 has a power of two for its scale, stored as its exponent. Written with
the tensors above it is nf4 with another table, blocks of 32, and double quantization whose table holds all
powers of two:

    absmax[b] = nested_code[exponent] = 2^(exponent - 127),     nested_absmax 1, nested_offset 0

8 bits (int8). One absmax per row, `data` int8 [out, in] and `row_absmax` float32 [out], W = data * row_absmax
/ 127.

none (unquantized). `data` [out, in] in the compute dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from qlora_train.units import ceil_div

FormatName = Literal["nf4", "fp4", "mxfp4", "int8", "none"]
NESTED_BLOCK_SIZE = 256
SCALE_BYTES = 4  # of one fp32 absmax


@dataclass(frozen=True)
class Quantization:
    """The quantization of frozen weights. `double_quant` and `block_size` (numbers per absmax) apply to 4
    bits only."""

    format: FormatName
    double_quant: bool = False
    block_size: int = 64

    @property
    def is_4bit(self) -> bool:
        return self.format in ("nf4", "fp4", "mxfp4")

    @property
    def is_quantized(self) -> bool:
        return self.format != "none"

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[str | None, tuple[int, ...]]]:
        """The tensors of a weight [out, in]: name -> (dtype, shape); dtype None: the compute dtype."""
        if self.format == "none":
            return {"data": (None, shape)}
        if self.format == "int8":
            return {"data": ("int8", shape), "row_absmax": ("float32", (shape[0],))}
        num_elements = math.prod(shape)
        num_blocks = ceil_div(num_elements, self.block_size)
        data: dict[str, tuple[str | None, tuple[int, ...]]] = {"data": ("uint8", ((num_elements + 1) // 2,))}
        if not self.double_quant:
            return data | {"absmax": ("float32", (num_blocks,))}
        return data | {
            "absmax": ("uint8", (num_blocks,)),
            "nested_absmax": ("float32", (ceil_div(num_blocks, NESTED_BLOCK_SIZE),)),
            "nested_offset": ("float32", ()),
            "nested_code": ("float32", (256,)),
        }

    def by_row(self, num_columns: int) -> Quantization:
        """The quantization of this matrix's rows stored separately, each with its own fp32 scales.

        `UNQUANTIZED` if blocks are not aligned with rows of `num_columns` numbers."""
        if self.is_4bit and num_columns % self.block_size != 0:
            return UNQUANTIZED
        return replace(self, double_quant=False)

    def row_code_bytes(self, num_columns: int) -> int:
        """Bytes of the codes of one row stored `by_row`."""
        return num_columns // 2 if self.is_4bit else num_columns

    def row_bytes(self, num_columns: int, itemsize: int) -> int:
        """Bytes of one row stored `by_row`: codes, then scales. itemsize: bytes of an unquantized number."""
        if not self.is_quantized:
            return num_columns * itemsize
        num_scales = num_columns // self.block_size if self.is_4bit else 1
        return self.row_code_bytes(num_columns) + SCALE_BYTES * num_scales


UNQUANTIZED = Quantization("none")
MXFP4 = Quantization("mxfp4", double_quant=True, block_size=32)
MXFP4_CODE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
