"""4-bit quantization on the CPU: per number the index of the nearest of 16 code values, two per byte.

The maths. A flat row of n numbers is divided into blocks. With absmax = max |w| of a block, in float32,

    x = w * (1 / max(absmax, 1e-38))     in [-1, 1], up to one rounding
    rank = number of the 15 midpoints between adjacent code values that are below x
    index = index of the code value of this rank (nf4's values are in ascending order, fp4's are not)

and the last block, if incomplete, divides by max(absmax, 1e-38) and stores that as its absmax. These are the
roundings of bitsandbytes; dividing everywhere would change the last bit of some x, and so a few bytes.
`quantize_4bit_reference` is exactly this.

A faster method: the search among 15 midpoints takes about 30 ns per number on one core. But the index is a
step function of x: a table of 2^17 cells over [-1, 1] holds it, except for the few cells that contain a
midpoint. `Quantizer4bit` therefore

    1. adds 192 to x. The sum is in [128, 256), where float32 numbers are 2^-16 apart, so its bit pattern, as
       an integer, is a cell number: no multiplication, rounding mode or conversion;
    2. looks up the cell: the index, or MIXED if it contains a midpoint;
    3. searches the midpoints for MIXED numbers only, from w, as the reference does: about 1 in 10,000 of a
       model's weights. (A weight full of midpoints is all MIXED: the bytes are the same, at the speed of the
       search. So are zeros in fp4, which has 0 and -0 and a midpoint between them.)

The table has 128 KiB, and a chunk of numbers stays in the processor's cache from step to step: scratch is 10
bytes per number of one chunk, 5 MiB. All steps take 2 ns per number on one core, of which the look-up, which
torch runs on one core only, takes 0.6. A table indexed by the number itself would not need step 1, but one
table per block; 15 comparisons of whole chunks need no table, and take ten times as long.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

CACHE_CHUNK_ELEMENTS = 2**19  # a multiple of every block size
SMALLEST_ABSMAX = 1e-38  # keeps the reciprocal of an all-zero block finite
CELL_BITS = 16  # a cell is 2^-16 wide
ANCHOR = 1.5 * 2.0 ** (23 - CELL_BITS)  # float32 numbers around it are one cell apart
ANCHOR_PATTERN = int(np.float32(ANCHOR).view(np.int32))
MIXED = 0x80


def midpoints(code: Tensor) -> tuple[Tensor, Tensor]:
    """The 15 midpoints of 16 code values (float32, any order), ascending, and the indices (uint8 [16]) that
    sort the values."""
    order = torch.argsort(code)
    return (code[order[:-1]] + code[order[1:]]) / 2, order.to(torch.uint8)


def quantize_4bit_reference(flat: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Reference 4-bit quantization. `flat`: 16- or 32-bit floats [n]; `code`: float32 [16].

    Returns the indices, uint8 [ceil(n / 2)], the first number in the high nibble (an odd n is padded with a
    zero), and absmax, float32 [ceil(n / block_size)].
    """
    whole = len(flat) // block_size * block_size
    numbers = flat.float()
    blocks, rest = numbers[:whole].view(-1, block_size), numbers[whole:]
    absmax = blocks.abs().amax(1)
    x = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]).view(-1)
    if len(rest):
        rest_absmax = rest.abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, rest_absmax[None]])
        x = torch.cat([x, rest / rest_absmax])
    if len(flat) % 2:
        x = torch.cat([x, torch.zeros(1)])
    bounds, order = midpoints(code)
    indices = order[torch.bucketize(x, bounds)]
    return indices[::2] << 4 | indices[1::2], absmax


@cache
def _cells(code: tuple[float, ...]) -> Tensor:
    """The look-up table, uint8 [2 * 2^CELL_BITS + 1]: the index of all x in a cell, or MIXED."""
    bounds, order = midpoints(torch.tensor(code))
    centre = torch.arange(-(2**CELL_BITS), 2**CELL_BITS + 1)
    # x + ANCHOR is rounded to the nearest: both ends of a cell belong to it.
    lowest, highest = (torch.bucketize((centre + side) * 2.0**-CELL_BITS, bounds) for side in (-0.5, 0.5))
    return torch.where(lowest == highest, order[lowest], MIXED).to(torch.uint8)


class Quantizer4bit:
    """Faster `quantize_4bit_reference` with the same bytes. Holds the scratch: one thread at a time."""

    def __init__(self, code: Tensor, block_size: int) -> None:
        """code: float32 [16] in [-1, 1]. block_size: a multiple of 8 that divides CACHE_CHUNK_ELEMENTS."""
        assert CACHE_CHUNK_ELEMENTS % block_size == 0 and block_size % 8 == 0, block_size
        self._code, self._block_size = code, block_size
        self._bounds, self._order = (tensor.numpy() for tensor in midpoints(code))
        self._cell_index = _cells(tuple(code.tolist()))
        self._numbers = torch.empty(CACHE_CHUNK_ELEMENTS)
        self._x = torch.empty(CACHE_CHUNK_ELEMENTS)
        self._indices = torch.empty(CACHE_CHUNK_ELEMENTS, dtype=torch.uint8)
        self._pairs = np.empty(CACHE_CHUNK_ELEMENTS // 2, dtype=np.uint16)

    def quantize(self, flat: Tensor, quantized: Tensor, absmax: Tensor) -> None:
        """Quantize `flat`, 16- or 32-bit floats [n] on the CPU, into `quantized`, uint8 [ceil(n / 2)], and
        `absmax`, float32 [ceil(n / block_size)]."""
        block = self._block_size
        whole = len(flat) // block * block
        for start in range(0, whole, CACHE_CHUNK_ELEMENTS):
            stop = min(start + CACHE_CHUNK_ELEMENTS, whole)
            self._quantize_chunk(
                flat[start:stop], quantized[start // 2 : stop // 2], absmax[start // block : stop // block]
            )
        if whole < len(flat):
            self._quantize_exactly(flat[whole:], quantized[whole // 2 :], absmax[whole // block :])

    def _quantize_exactly(self, flat: Tensor, quantized: Tensor, absmax: Tensor) -> None:
        exact_quantized, exact_absmax = quantize_4bit_reference(flat, self._code, self._block_size)
        quantized.copy_(exact_quantized)
        absmax.copy_(exact_absmax)

    def _quantize_chunk(self, flat: Tensor, quantized: Tensor, absmax: Tensor) -> None:
        size = len(flat)
        numbers, x, indices = self._numbers[:size], self._x[:size], self._indices[:size]
        in_blocks = (-1, self._block_size)
        numbers.copy_(flat)
        torch.abs(numbers, out=x)
        torch.amax(x.view(in_blocks), 1, out=absmax)
        if not math.isfinite(absmax.amax()):  # x may be NaN, which is in no cell
            self._quantize_exactly(flat, quantized, absmax)
            return

        reciprocal = 1.0 / absmax.clamp(min=SMALLEST_ABSMAX)
        torch.mul(numbers.view(in_blocks), reciprocal[:, None], out=x.view(in_blocks))
        cells = x.add_(ANCHOR).view(torch.int32).sub_(ANCHOR_PATTERN - 2**CELL_BITS)
        torch.index_select(self._cell_index, 0, cells, out=indices)

        self._settle_mixed(indices.numpy(), numbers.numpy(), reciprocal.numpy())
        # A little-endian pair is first + 256 * second; times 4097, its high byte is 16 * first + second.
        pairs = np.multiply(indices.numpy().view(np.uint16), np.uint16(4097), out=self._pairs[: size // 2])
        np.right_shift(pairs, 8, out=quantized.numpy(), casting="unsafe")

    def _settle_mixed(self, indices: np.ndarray, numbers: np.ndarray, reciprocal: np.ndarray) -> None:
        """Replace every MIXED in `indices` by the exact index. They are rare, so eight are tested at once."""
        eights = np.flatnonzero(indices.view(np.uint64) & np.uint64(0x0101010101010101 * MIXED))
        places = (8 * eights[:, None] + np.arange(8)).reshape(-1)
        places = places[indices[places] == MIXED]
        x = numbers[places] * reciprocal[places // self._block_size]
        indices[places] = self._order[np.searchsorted(self._bounds, x)]
