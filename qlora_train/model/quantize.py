"""Packing: frozen weights as 4-bit or 8-bit codes and scales, byte for byte as bitsandbytes makes them.

4 bits (nf4, fp4). The weight [out, in] is read as one flat row of n = out*in numbers, cut into blocks of 64.
A block keeps its absolute maximum (fp32) and, per number, the index of the code value, one of 16, that is
nearest to w / absmax:

    data    uint8 [ceil(n/2)]          two codes a byte, the first in the high nibble
    absmax  float32 [ceil(n/64)]       w = code[index] * absmax

Double quantisation packs absmax itself: less its mean (nested_offset), in blocks of 256, as indices into a
256-entry table:

    absmax  uint8 [ceil(n/64)]         absmax = nested_code[absmax] * nested_absmax + nested_offset
    nested_absmax float32 [ceil(n/64/256)], nested_offset float32 [], nested_code float32 [256]

which makes (4 + 8/64 + 32/(64*256)) / 8 = 0.5159 byte per number, against 0.5625 without.

8 bits (int8). One absmax per row, `data` int8 [out, in] and `row_absmax` float32 [out], W = data * row_absmax
/ 127. bitsandbytes casts the weight to fp16 before it packs int8, so we do: from bf16 or fp32 weights that
costs a rounding, and weights beyond 65504 are refused.

The quantisers are the library's own, but for 4 bits on the CPU, where `kernels/quantize_4bit.py` makes the
same bytes ten times as fast. Called on a whole weight, the library's needs 11 (nf4) to 26 (fp4) bytes of
scratch per number: 0.7 to 1.5 GB for one MLP matrix of an 8B model. But blocks are independent: chunks of
whole blocks give the same bytes, the remainder of a row block is carried into the next, and scratch stays
below 64 MiB.

Double-quantised scales depend on the order in which nested_offset, a mean, is summed. torch splits one sum
over its threads, so in the library their last bits change with the number of threads beyond 2M numbers. Here
(`_mean`) they are those of one thread, always: a packed base has one fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_train.device.description import UnpackKernel
from qlora_train.errors import BaseModelError
from qlora_train.kernels.quantize_4bit import Quantizer4bit

Format = Literal["nf4", "fp4", "int8", "none"]
NESTED_BLOCK_SIZE = 256
CHUNK_ELEMENTS = 2**20  # what the library's quantiser is given at once
UNPACK_ELEMENTS = 2**21  # what its dequantiser is given at once without a GPU
PACKABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packing:
    """How frozen weights are packed. `double_quant` and `block_size` (numbers per absmax) matter for nf4
    and fp4 only."""

    format: Format
    double_quant: bool = False
    block_size: int = 64

    @property
    def is_4bit(self) -> bool:
        return self.format in ("nf4", "fp4")


@dataclass(frozen=True)
class PackedWeight:
    """One weight [out, in], packed. `tensors` are those of `packed_layout`, all on one device."""

    packing: Packing
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedWeight:
        """The same bytes on another device."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors.items()}
        return PackedWeight(self.packing, self.shape, moved)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as numbers: what training multiplies with."""
        return self.unpack_rows(0, self.shape[0], dtype)

    def unpack_into(self, out: Tensor, kernel: UnpackKernel) -> Tensor:
        """`unpack(out.dtype)` written into `out` [out, in], contiguous; returns it.

        kernel: of the device that it is on. 4 bits on a GPU: one launch of our kernel where Triton runs, else
        the library's, which can write into `out` where rows are whole blocks. Everything else a cache-sized
        part at a time: the library's functions then only return new tensors."""
        if self.packing.is_4bit and kernel == "triton":
            return self._unpack_in_one_launch(out)
        if self.packing.is_4bit and kernel == "library" and self.shape[1] % self.packing.block_size == 0:
            data = self.tensors["data"].unsqueeze(1)
            return bnb.dequantize_4bit(data, self._state(0, self.shape[0], out.dtype), out=out)
        step = max(1, UNPACK_ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            out[start:stop] = self.unpack_rows(start, stop, out.dtype)
        return out

    def _unpack_in_one_launch(self, out: Tensor) -> Tensor:
        from qlora_train.kernels.unpack_4bit import NestedScales, Packed4bit, unpack_4bit  # imports Triton

        t, nested = self.tensors, None
        if self.packing.double_quant:
            nested = NestedScales(t["nested_code"], t["nested_absmax"], t["nested_offset"])
        code = _code_on(self.packing.format, out.device)
        packed = Packed4bit(t["data"], t["absmax"], code, self.packing.block_size, nested)
        return unpack_4bit(packed, out)

    def unpack_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start..stop of `unpack(dtype)`, bit for bit: [stop - start, in]."""
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        if start == stop:
            return torch.empty(0, self.shape[1], dtype=dtype, device=self.tensors["data"].device)
        if self.packing.is_4bit:
            return self._unpack_4bit(start, stop, dtype)
        if self.packing.format == "int8":
            return self._unpack_int8(start, stop, dtype)
        return self.tensors["data"][start:stop].to(dtype)

    def _unpack_4bit(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        columns = self.shape[1]
        begin, end = start * columns, stop * columns
        origin, limit = self._stored_range(begin, end)
        data = self.tensors["data"][origin // 2 : limit // 2].unsqueeze(1)
        flat = bnb.dequantize_4bit(data, self._state(start, stop, dtype)).reshape(-1)
        return flat[begin - origin : end - origin].reshape(stop - start, columns)

    def _stored_range(self, begin: int, end: int) -> tuple[int, int]:
        """The numbers begin..end widened to whole blocks, as far as there are any."""
        block = self.packing.block_size
        num_stored = 2 * len(self.tensors["data"])  # n, or n + 1: the last byte's low nibble is then padding
        return begin // block * block, min(-(-end // block) * block, num_stored)

    def _state(self, start: int, stop: int, dtype: torch.dtype) -> bnb.QuantState:
        """What the library's kernel is told about rows start..stop."""
        block, columns = self.packing.block_size, self.shape[1]
        begin, end = start * columns, stop * columns
        origin, limit = self._stored_range(begin, end)
        # A matrix only if rows are whole blocks: else the library's CPU kernel takes the wrong absmax.
        as_matrix = columns % block == 0
        return bnb.QuantState(
            absmax=self.block_absmax(begin // block, -(-end // block)),
            shape=torch.Size((stop - start, columns) if as_matrix else (1, limit - origin)),
            blocksize=block,
            quant_type=self.packing.format,
            dtype=dtype,
        )

    def block_absmax(self, first_block: int, last_block: int) -> Tensor:
        """The fp32 absmax of 4-bit blocks first..last."""
        absmax = self.tensors["absmax"]
        if not self.packing.double_quant:
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

    def _unpack_int8(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        data, row_absmax = self.tensors["data"], self.tensors["row_absmax"]
        out = torch.empty(stop - start, self.shape[1], dtype=dtype, device=data.device)
        step = max(1, CHUNK_ELEMENTS // self.shape[1])
        for row in range(start, stop, step):
            rows = slice(row, min(row + step, stop))
            out[rows.start - start : rows.stop - start] = bnb.int8_vectorwise_dequant(
                data[rows], row_absmax[rows]
            )
        return out


@cache
def _code_on(form: Format, device: torch.device) -> Tensor:
    """float32 [16] on `device`: what the library unpacks the 16 codes to there. It has a table per device,
    and what it packs with is yet another one: asked, it is right to the last bit."""
    every_code = torch.tensor([[17 * even + 1] for even in range(0, 16, 2)], dtype=torch.uint8, device=device)
    ones = torch.ones(1, device=device)
    state = bnb.QuantState(ones, torch.Size((1, 16)), blocksize=64, quant_type=form, dtype=torch.float32)
    return bnb.dequantize_4bit(every_code, state).view(-1)


def packed_layout(
    packing: Packing, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors a weight [out, in] packs into: name -> (dtype, shape). `dtype` is that of unpacked
    weights ("none")."""
    num_elements = math.prod(shape)
    if packing.format == "none":
        return {"data": (dtype, shape)}
    if packing.format == "int8":
        return {"data": (torch.int8, shape), "row_absmax": (torch.float32, (shape[0],))}
    num_blocks = -(-num_elements // packing.block_size)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "data": (torch.uint8, ((num_elements + 1) // 2,)),
        "absmax": (torch.uint8 if packing.double_quant else torch.float32, (num_blocks,)),
    }
    if packing.double_quant:
        layout["nested_absmax"] = (torch.float32, (-(-num_blocks // NESTED_BLOCK_SIZE),))
        layout["nested_offset"] = (torch.float32, ())
        layout["nested_code"] = (torch.float32, (256,))
    return layout


def pack(
    rows: Iterable[Tensor],
    shape: tuple[int, int],
    packing: Packing,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
    out: dict[str, Tensor] | None = None,
) -> PackedWeight:
    """Pack a weight [out, in] that arrives as consecutive blocks of rows (any sizes; each is done with
    before the next).

    nf4 and fp4 quantise the numbers in the dtype they come in, on `device`: the result has the bytes of
    `bitsandbytes.functional.quantize_4bit(whole, blocksize=64, compress_statistics=double_quant)`. int8 has
    those of `int8_vectorwise_quant(whole.to(float16))`. "none" casts to `dtype`, which nothing else uses.

    `out`: the tensors of `packed_layout` to write into, such as views of a slab, which the result then holds;
    they say the device. Without it they are allocated on `device`.

    Raises `BaseModelError`, saying `name`, for weights that are not finite, or are not 16- or 32-bit floats.
    """
    layout = packed_layout(packing, shape, dtype)
    tensors = out or {
        key: torch.empty(size, dtype=kind, device=device) for key, (kind, size) in layout.items()
    }
    found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    assert found == layout, f"{name}: packs into {layout}, not {found}"
    rows = _checked(rows, name)
    if packing.is_4bit:
        num_elements, scales = _pack_4bit(rows, packing, tensors)
    elif packing.format == "int8":
        num_elements, scales = _pack_int8(rows, shape[1], tensors)
    else:
        num_elements, scales = _pack_none(rows, tensors["data"])
    assert num_elements == math.prod(shape), (
        f"{name}: the row blocks hold {num_elements} numbers, not {shape}"
    )
    if not torch.isfinite(scales).all():
        raise BaseModelError(
            f"{name}: holds values that are not finite, or that float16 cannot hold "
            f"(packing as {packing.format}, dtype {dtype}). Use nf4, or bfloat16, or repair the checkpoint."
        )
    return PackedWeight(packing, shape, tensors)


def _checked(rows: Iterable[Tensor], name: str) -> Iterator[Tensor]:
    for block in rows:
        if block.dtype not in PACKABLE_DTYPES:
            raise BaseModelError(
                f"{name}: has the dtype {block.dtype}; only float32, float16 and bfloat16 weights can be"
                " packed. Convert the checkpoint to bfloat16 first."
            )
        yield block


def _pack_4bit(rows: Iterable[Tensor], packing: Packing, tensors: dict[str, Tensor]) -> tuple[int, Tensor]:
    data, device = tensors["data"], tensors["data"].device
    absmax = (
        torch.empty(tensors["absmax"].shape, device=device) if packing.double_quant else tensors["absmax"]
    )
    block, done = packing.block_size, 0
    quantize = _quantizer_4bit(packing, device)
    for chunk in _whole_blocks(rows, block):
        stop = done + len(chunk)
        quantize(chunk, data[done // 2 : (stop + 1) // 2], absmax[done // block : -(-stop // block)])
        done = stop
    if packing.double_quant:
        _pack_absmax(absmax, tensors)
        return done, tensors["nested_offset"]  # the mean: not finite if any absmax is not
    return done, absmax


def _quantizer_4bit(packing: Packing, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], None]:
    """What quantises a flat chunk into (data, absmax), tensors on `device`."""
    if device.type == "cpu":
        return Quantizer4bit(bnb.get_4bit_type(packing.format, device="cpu"), packing.block_size).quantize

    def quantize(chunk: Tensor, data: Tensor, absmax: Tensor) -> None:
        codes, state = bnb.quantize_4bit(
            chunk.to(device), blocksize=packing.block_size, quant_type=packing.format
        )
        data.copy_(codes.squeeze(1))
        absmax.copy_(state.absmax)

    return quantize


def _pack_absmax(absmax: Tensor, tensors: dict[str, Tensor]) -> None:
    """Double quantisation; overwrites `absmax`."""
    offset = _mean(absmax)
    codes, state = bnb.quantize_blockwise(absmax.sub_(offset), blocksize=NESTED_BLOCK_SIZE)
    tensors["absmax"].copy_(codes)
    tensors["nested_absmax"].copy_(state.absmax)
    tensors["nested_offset"].copy_(offset)
    tensors["nested_code"].copy_(state.code)


def _mean(values: Tensor) -> Tensor:
    """As `values.mean()` with one thread, bit for bit. On a CPU several threads share a single sum; of two
    sums each takes whole ones, in the order of one thread. So there are two, of the same numbers."""
    return values.expand(2, -1).mean(-1)[0] if values.device.type == "cpu" else values.mean()


def _whole_blocks(rows: Iterable[Tensor], block: int) -> Iterator[Tensor]:
    """Re-cut row blocks into flat chunks of whole quantisation blocks; only the last chunk may end inside
    one."""
    carry = torch.empty(0)
    for part in rows:
        flat = part.reshape(-1)
        if len(carry):
            missing = block - len(carry)
            carry = torch.cat([carry, flat[:missing]])
            flat = flat[missing:]
            if len(carry) < block:
                continue
            yield carry
        whole = len(flat) // block * block
        yield from flat[:whole].split(CHUNK_ELEMENTS) if whole else ()
        carry = flat[whole:].clone()  # the row buffer is about to be overwritten
    if len(carry):
        yield carry


def _pack_int8(rows: Iterable[Tensor], columns: int, tensors: dict[str, Tensor]) -> tuple[int, Tensor]:
    data, row_absmax, done = tensors["data"], tensors["row_absmax"], 0
    for part in rows:
        for chunk in part.split(max(1, CHUNK_ELEMENTS // columns)):
            half = chunk.to(device=data.device, dtype=torch.float16)
            codes, scales, _ = bnb.int8_vectorwise_quant(half)
            data[done : done + len(chunk)] = codes
            row_absmax[done : done + len(chunk)] = scales
            done += len(chunk)
    return done * columns, row_absmax


def _pack_none(rows: Iterable[Tensor], data: Tensor) -> tuple[int, Tensor]:
    done, largest = 0, []
    for part in rows:
        data[done : done + len(part)] = part.to(data.device)
        largest.append(data[done : done + len(part)].abs().amax())
        done += len(part)
    return done * data.shape[1], torch.stack(largest)
