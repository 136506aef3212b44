"""Packing: the frozen weights as 4-bit or 8-bit codes and their scales, byte for byte as bitsandbytes makes
them.

4 bits (nf4, fp4). The weight [out, in] is read as one flat row of n = out*in numbers, cut into blocks of
64. A block keeps its absolute maximum (fp32) and, per number, the index of the nearest of 16 code values to
w / absmax:

    data    uint8 [ceil(n/2)]          two codes a byte, the first in the high nibble
    absmax  float32 [ceil(n/64)]       w = code[index] * absmax

Double quantisation packs absmax itself: less its mean (nested_offset), in blocks of 256, as indices into a
256-entry table:

    absmax  uint8 [ceil(n/64)]         absmax = nested_code[absmax] * nested_absmax + nested_offset
    nested_absmax float32 [ceil(n/64/256)], nested_offset float32 [], nested_code float32 [256]

which makes (4 + 8/64 + 32/(64*256)) / 8 = 0.5159 byte per number, against 0.5625 without. 8 bits (int8):
one absmax per row, `data` int8 [out, in] and `row_absmax` float32 [out], W = data * row_absmax / 127.
bitsandbytes casts the weight to fp16 before it packs int8, so we do: from bf16 or fp32 weights that costs a
rounding, and weights beyond 65504 are refused.

The quantisers are the library's own; only the walk is ours. Called on a whole weight, its CPU quantiser needs
11 (nf4) to 26 (fp4) bytes of scratch per number: 0.7 to 1.5 GB for one MLP matrix of an 8B model. But blocks
are independent: chunks of whole blocks give the same bytes, the remainder of a row block is carried into the
next, and scratch stays below 64 MiB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_train.errors import BaseModelError
from qlora_train.model.shards import ShardReader

Format = Literal["nf4", "fp4", "int8", "none"]
NESTED_BLOCK_SIZE = 256
CHUNK_ELEMENTS = 2**20  # what the library's quantiser is given at once
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
        block, columns = self.packing.block_size, self.shape[1]
        begin, end = start * columns, stop * columns
        first_block, last_block = begin // block, -(-end // block)
        num_stored = 2 * len(self.tensors["data"])  # n, or n + 1: the last byte's low nibble is then padding
        origin, limit = first_block * block, min(last_block * block, num_stored)
        # A matrix only if rows are whole blocks: else the library's CPU kernel takes the wrong absmax.
        as_matrix = columns % block == 0
        state = bnb.QuantState(
            absmax=self._absmax(first_block, last_block),
            shape=torch.Size((stop - start, columns) if as_matrix else (1, limit - origin)),
            blocksize=block,
            quant_type=self.packing.format,
            dtype=dtype,
        )
        data = self.tensors["data"][origin // 2 : limit // 2].unsqueeze(1)
        flat = bnb.dequantize_4bit(data, state).reshape(-1)
        return flat[begin - origin : end - origin].reshape(stop - start, columns)

    def _absmax(self, first_block: int, last_block: int) -> Tensor:
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
) -> PackedWeight:
    """Pack a weight [out, in] that arrives as consecutive blocks of rows (any sizes; each is done with
    before the next).

    nf4 and fp4 quantise the numbers in the dtype they come in, on `device`: the result has the bytes of
    `bitsandbytes.functional.quantize_4bit(whole, blocksize=64, compress_statistics=double_quant)`. int8 has
    those of `int8_vectorwise_quant(whole.to(float16))`. "none" casts to `dtype`, which nothing else uses.

    Raises `BaseModelError`, saying `name`, for weights that are not finite, or are not 16- or 32-bit floats.
    """
    layout = packed_layout(packing, shape, dtype)
    tensors = {key: torch.empty(size, dtype=kind, device=device) for key, (kind, size) in layout.items()}
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
    for chunk in _whole_blocks(rows, block):
        codes, state = bnb.quantize_4bit(chunk.to(device), blocksize=block, quant_type=packing.format)
        data[done // 2 : done // 2 + len(codes)] = codes.squeeze(1)
        absmax[done // block : done // block + len(state.absmax)] = state.absmax
        done += len(chunk)
    if packing.double_quant:
        _pack_absmax(absmax, tensors)
        return done, tensors["nested_offset"]  # the mean: not finite if any absmax is not
    return done, absmax


def _pack_absmax(absmax: Tensor, tensors: dict[str, Tensor]) -> None:
    """Double quantisation; overwrites `absmax`."""
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax.sub_(offset), blocksize=NESTED_BLOCK_SIZE)
    tensors["absmax"].copy_(codes)
    tensors["nested_absmax"].copy_(state.absmax)
    tensors["nested_offset"].copy_(offset)
    tensors["nested_code"].copy_(state.code)


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


def read_bitsandbytes_weight(
    reader: ShardReader, name: str, device: torch.device | str = "cpu"
) -> PackedWeight | None:
    """The weight `name` (such as "model.layers.0.mlp.up_proj.weight") if bitsandbytes has already packed
    it, else None.

    The bytes are taken as they are. Raises `BaseModelError` if they are incomplete or do not fit each other.
    """
    form = _form_of(reader, name)
    scale_name = name.removesuffix("weight") + "SCB"
    if form:
        packed = _read_4bit(reader, name, form)
    elif scale_name in reader:
        packed = _read_int8(reader, name, scale_name)
    elif not reader.info(name).dtype.is_floating_point:
        raise _damaged(
            reader,
            name,
            f"it is {reader.info(name).dtype} but has no bitsandbytes quant_state or SCB beside it",
        )
    else:
        return None
    for key, (dtype, shape) in packed_layout(packed.packing, packed.shape, torch.bfloat16).items():
        tensor = packed.tensors[key]
        if tensor.dtype != dtype or tensor.shape != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise _damaged(
                reader, name, f"its {key} is {found} where the weight's shape needs {dtype} {list(shape)}"
            )
    return packed.to(device)


def bitsandbytes_shape(reader: ShardReader, name: str) -> tuple[int, int] | None:
    """The unpacked shape of a weight that bitsandbytes has packed to 4 bits, without reading the weight;
    else None."""
    form = _form_of(reader, name)
    return _read_state(reader, name, form)[1] if form else None


def is_bitsandbytes_constant(name: str) -> bool:
    """Whether a tensor of a checkpoint is not a weight but belongs to one that bitsandbytes has packed."""
    return (
        re.search(r"\.weight\.(nested_)?(absmax|quant_map|quant_state\.\w+)$|\.(SCB|weight_format)$", name)
        is not None
    )


def _form_of(reader: ShardReader, name: str) -> Literal["nf4", "fp4"] | None:
    forms: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4")
    return next((form for form in forms if f"{name}.quant_state.bitsandbytes__{form}" in reader), None)


def _read_state(
    reader: ShardReader, name: str, form: Literal["nf4", "fp4"]
) -> tuple[Packing, tuple[int, int], Tensor]:
    """The JSON beside a 4-bit weight: packing, unpacked shape, nested offset."""
    raw = bytes(reader.read(f"{name}.quant_state.bitsandbytes__{form}").numpy())
    try:
        state: dict[str, Any] = json.loads(raw)
        out_features, in_features = (int(size) for size in state["shape"])
        packing = Packing(form, "nested_offset" in state, int(state["blocksize"]))
        offset = torch.tensor(float(state.get("nested_offset", 0.0)))
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(reader, name, f"its quant_state does not parse ({error!r})") from error
    if packing.block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096) or state.get("quant_type") != form:
        raise _damaged(reader, name, f"its quant_state says {state}")
    if packing.double_quant and (state.get("nested_blocksize"), state.get("nested_dtype")) != (
        256,
        "float32",
    ):
        raise _damaged(
            reader, name, f"its quant_state says {state}, where nested blocks of 256 float32 are needed"
        )
    return packing, (out_features, in_features), offset


def _read_4bit(reader: ShardReader, name: str, form: Literal["nf4", "fp4"]) -> PackedWeight:
    packing, shape, offset = _read_state(reader, name, form)
    code = reader.read(f"{name}.quant_map")
    if code.shape != (16,) or not torch.allclose(code, bnb.get_4bit_type(form, device="cpu"), atol=1e-6):
        raise _damaged(reader, name, f"its quant_map is not the {form} table")
    tensors = {
        "data": reader.read(name).reshape(-1).view(torch.uint8),  # other storage dtypes hold the same bytes
        "absmax": reader.read(f"{name}.absmax"),
    }
    if packing.double_quant:
        tensors["nested_absmax"] = reader.read(f"{name}.nested_absmax")
        tensors["nested_offset"] = offset
        tensors["nested_code"] = reader.read(f"{name}.nested_quant_map")
    return PackedWeight(packing, shape, tensors)


def _read_int8(reader: ShardReader, name: str, scale_name: str) -> PackedWeight:
    format_name = name + "_format"
    if format_name in reader and int(reader.read(format_name)) != 0:
        raise _damaged(
            reader, name, "its weight_format is not row-major, which old GPU-specific checkpoints had"
        )
    info = reader.info(name)
    if len(info.shape) != 2:
        raise _damaged(reader, name, f"it has the shape {list(info.shape)}")
    tensors = {"data": reader.read(name), "row_absmax": reader.read(scale_name).reshape(-1)}
    return PackedWeight(Packing("int8"), (info.shape[0], info.shape[1]), tensors)


def _damaged(reader: ShardReader, name: str, what: str) -> BaseModelError:
    return BaseModelError(
        f"{reader.folder}: {name} is packed by bitsandbytes but cannot be used: {what}. "
        "Download the checkpoint again, or use one that is not quantised."
    )
