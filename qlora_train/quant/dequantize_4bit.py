"""4-bit dequantization on a GPU in one launch: codes and scales in, 16- or 32-bit numbers out.

The maths, for number i of the flat weight and b its block of `block_size` numbers:

    absmax = nested_code[absmax_code[b]] * nested_absmax[b // 256] + nested_offset     or absmax[b] itself
    w      = code[nibble i] * absmax            in float32, then rounded to the output's dtype

These are the roundings of bitsandbytes, which needs three launches: codes times nested_absmax; plus the
offset; numbers. So product and sum are rounded separately here too: a fused multiply-add would differ in the
last bit of absmax, and the compiler option for it is off. Results below 1.2e-38 are kept, as bitsandbytes
does on a CPU (its CUDA code is compiled to flush them to 0).

Bytes: per number half a byte is read and, for 16 bits, 2 are written: for 4096 x 14336 29 + 117 MB, and 1 MB
of scales. The library's float32 scales cost 16 bytes more per block of 64, about a tenth, and two
allocations. Nothing is saved for backward, which dequantizes again.

How: a program computes a tile of 1024 numbers; tiles are counted from the start of the weight for every
`start`, so codes are always read in whole aligned words. A tile is divided into segments of 32 numbers, which
never cross a block boundary, so a scale is computed per segment, not per number. A thread holds 4 bytes of a
segment: it reads one word and writes 8 adjacent numbers in one 16-byte store (16-bit output), without shared
memory. The 16 code values are read from memory: they are half a cache line and always cached, and a look-up
takes fewer instructions than a tree of comparisons.

`dequantize_4bit_reference` is the formula in torch's operations, on any device. Why not torch.compile of it:
it may or may not fuse the multiply-add, and would compile again for every shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_train.kernels.triton_support import launching_on
from qlora_train.quant.formats import NESTED_BLOCK_SIZE

TILE = tl.constexpr(1024)  # numbers computed by one program
SEGMENT = tl.constexpr(32)  # the smallest block size
SCALES_PER_NESTED = tl.constexpr(NESTED_BLOCK_SIZE)
WIDE_FROM = 2**31  # from this many numbers on, indices need 64 bits
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # 4 warps: 8 numbers per thread


@dataclass(frozen=True)
class NestedScales:
    """The scales of double-quantized absmax: code float32 [256], absmax float32 [ceil(num_blocks / 256)],
    offset float32 []."""

    code: Tensor
    absmax: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Quantized4bit:
    """A flat row of n numbers in 4 bits, as contiguous tensors on one device.

    data: uint8 [ceil(n / 2)], two codes per byte, the first in the high nibble. absmax: one per block of
    `block_size` numbers (a multiple of 32), float32, or uint8 codes if `nested` is given. code: float32 [16].
    """

    data: Tensor
    absmax: Tensor
    code: Tensor
    block_size: int
    nested: NestedScales | None = None


def dequantize_4bit_reference(quantized: Quantized4bit, out: Tensor, start: int = 0) -> Tensor:
    """Dequantize numbers start, start + 1, ... of the row into `out`, as many as it holds; returns `out`.

    out: any shape and float dtype. Working memory: about 30 bytes per number."""
    numbers = torch.arange(start, start + out.numel(), device=out.device)
    pairs = quantized.data[numbers // 2].int()
    codes = torch.where(numbers % 2 == 0, pairs >> 4, pairs & 15)
    blocks = numbers // quantized.block_size
    absmax = quantized.absmax[blocks]
    if quantized.nested is not None:
        scaled = quantized.nested.code[absmax.int()] * quantized.nested.absmax[blocks // NESTED_BLOCK_SIZE]
        absmax = scaled + quantized.nested.offset
    return out.copy_((quantized.code[codes] * absmax).view(out.shape))


def dequantize_4bit(quantized: Quantized4bit, out: Tensor, start: int = 0) -> Tensor:
    """`dequantize_4bit_reference`, with the same bits, in one launch on the tensors' GPU.

    out: contiguous, float32, float16 or bfloat16. Fastest if `start` and the size of `out` are multiples of
    16."""
    stop, num_bytes = start + out.numel(), len(quantized.data)
    assert out.is_contiguous() and quantized.data.is_contiguous()
    assert start >= 0 and stop <= 2 * num_bytes, (start, stop, num_bytes)
    assert quantized.block_size % SEGMENT.value == 0, quantized.block_size
    if start == stop:
        return out
    unused = quantized.code
    nested = quantized.nested or NestedScales(unused, unused, unused)
    num_tiles = (stop - 1) // TILE.value - start // TILE.value + 1
    with launching_on(out):
        dequantize_4bit_kernel[(num_tiles,)](
            quantized.data,
            quantized.absmax,
            quantized.code,
            nested.code,
            nested.absmax,
            nested.offset,
            out,
            start,
            stop,
            num_bytes,
            BLOCK_SIZE=quantized.block_size,
            NESTED=quantized.nested is not None,
            WIDE=stop >= WIDE_FROM,
            **LAUNCH_OPTIONS,
        )
    return out


@triton.jit
def dequantize_4bit_kernel(  # type: ignore[no-untyped-def]
    data,
    absmax,
    code,
    nested_code,
    nested_absmax,
    nested_offset,
    out,
    start,
    stop,
    num_bytes,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Dequantize numbers start..stop of the row into out[0..]; program 0 computes the tile with `start`.

    num_bytes: of `data`. WIDE: indices into the row need 64 bits. Indices within a tile never do."""
    tile = start // TILE + tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
    first = tile * TILE
    skipped = tl.maximum(start - first, 0).to(tl.int32)
    end = tl.minimum(stop - first, TILE).to(tl.int32)
    end_byte = tl.minimum(num_bytes - first // 2, TILE // 2).to(tl.int32)

    segment = tl.arange(0, TILE // SEGMENT)
    block = (first + segment * SEGMENT) // BLOCK_SIZE
    is_there = segment * SEGMENT < end
    scale = tl.load(absmax + block, mask=is_there, other=0)
    if NESTED:
        group_scale = tl.load(nested_absmax + block // SCALES_PER_NESTED, mask=is_there, other=0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * group_scale
        scale = scale + tl.load(nested_offset)

    # One-dimensional: with a dimension of segments, Triton 3.6 exchanges codes through shared memory.
    byte = tl.arange(0, TILE // 2)
    pair = tl.load(data + first // 2 + byte, mask=byte < end_byte, other=0).to(tl.int32)
    scale = tl.broadcast_to(scale[:, None], (TILE // SEGMENT, SEGMENT // 2)).reshape(TILE // 2)
    high = tl.load(code + (pair >> 4)) * scale
    low = tl.load(code + (pair & 15)) * scale

    numbers = tl.join(high, low).reshape(TILE).to(out.dtype.element_ty)
    place = tl.arange(0, TILE)
    tl.store(out + (first - start) + place, numbers, mask=(place >= skipped) & (place < end))
