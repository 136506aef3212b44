"""Bytes of packed weights and slabs from shapes alone, without torch.

The same table as `model/quantize.packed_layout` and `model/slab.SlabLayout`, which a test holds it to; there
it is dtypes and shapes, here only sizes. For a weight of n = out * in numbers:

    nf4, fp4      ceil(n / 2) codes, ceil(n / 64) absmax in fp32 (0.5625 byte per number)
    double_quant  absmax as one byte, plus one fp32 per 256 of them, an offset and a table: 0.5159
    int8          n codes, one fp32 per row
    none          n numbers in the compute dtype
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Format = Literal["nf4", "fp4", "int8", "none"]
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
ALIGNMENT_BYTES = 64
UNPACK_CHUNK, INT8_CHUNK = 2**21, 2**20
"""Weights are unpacked in pieces of so many numbers."""


@dataclass(frozen=True)
class PackedSize:
    """Of one weight. data_bytes: codes; constant_bytes: scales and tables; padding_bytes: in a slab."""

    data_bytes: int
    constant_bytes: int
    padding_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.data_bytes + self.constant_bytes

    @property
    def slab_bytes(self) -> int:
        return self.num_bytes + self.padding_bytes


@dataclass(frozen=True)
class PackingSizes:
    """How weights are packed. itemsize: bytes of a number in the compute dtype."""

    format: Format
    double_quant: bool
    itemsize: int

    @property
    def is_4bit(self) -> bool:
        return self.format in ("nf4", "fp4")

    def of(self, shape: tuple[int, int]) -> PackedSize:
        """A weight [out, in], packed."""
        num_rows, num_columns = shape
        n = num_rows * num_columns
        if self.format == "none":
            data, constants = n * self.itemsize, []
        elif self.format == "int8":
            data, constants = n, [4 * num_rows]
        else:
            num_blocks = -(-n // BLOCK_SIZE)
            data = (n + 1) // 2
            constants = [num_blocks if self.double_quant else 4 * num_blocks]
            if self.double_quant:
                constants += [4 * -(-num_blocks // NESTED_BLOCK_SIZE), 4, 4 * 256]
        padding = sum(-size % ALIGNMENT_BYTES for size in (data, *constants))
        return PackedSize(data, sum(constants), padding)

    def row_bytes(self, num_columns: int) -> int:
        """One row of a matrix whose rows are stored with scales of their own (model/packed_matrix.py)."""
        if self.format == "none":
            return num_columns * self.itemsize
        return (
            num_columns + 4 if self.format == "int8" else num_columns // 2 + 4 * (num_columns // BLOCK_SIZE)
        )

    def rows_scratch_bytes(self, num_rows: int, num_columns: int) -> int:
        """What unpacking so many of those rows needs besides the result: their codes and scales apart."""
        if self.format == "none":
            return 0
        chunk = 4 * num_columns * min(num_rows, max(1, INT8_CHUNK // num_columns))
        return num_rows * self.row_bytes(num_columns) + (chunk if self.format == "int8" else 0)

    def slab_bytes(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """The slab of a layer with these linears."""
        return sum(self.of(shape).slab_bytes for shape in shapes.values())

    def unpacked_bytes(self, shape: tuple[int, int]) -> int:
        """The weight in the compute dtype."""
        return shape[0] * shape[1] * self.itemsize

    def buffer_bytes(self, shapes: Mapping[str, tuple[int, int]], *, hold_unpacked: bool) -> int:
        """What weights are unpacked into: the largest, or, where they are held, all of a layer's."""
        if self.format == "none":
            return 0
        sizes = [self.unpacked_bytes(shape) for shape in shapes.values()]
        return sum(sizes) if hold_unpacked else max(sizes)

    def scratch_bytes(self, shape: tuple[int, int], *, on_accelerator: bool) -> int:
        """What unpacking into a buffer needs besides: a piece of the weight and its absmax in fp32; on CUDA,
        whose kernel writes into the buffer, the absmax alone."""
        num_rows, num_columns = shape
        if self.format == "none":
            return 0
        if self.is_4bit and on_accelerator and num_columns % BLOCK_SIZE == 0:
            return self.absmax_bytes(num_rows * num_columns)
        n = num_columns * min(num_rows, max(1, UNPACK_CHUNK // num_columns))
        if self.format == "int8":
            return n * self.itemsize + 4 * num_columns * min(num_rows, max(1, INT8_CHUNK // num_columns))
        return n * self.itemsize + self.absmax_bytes(n)

    def absmax_bytes(self, num_numbers: int) -> int:
        """The fp32 absmax of so many numbers, where it has to be unpacked itself."""
        return 4 * -(-num_numbers // BLOCK_SIZE) if self.double_quant else 0
