"""Quantize weights into codes and scales (quant/formats.py), byte for byte as bitsandbytes does.

The quantizers are the library's own, except for 4 bits on the CPU, where `quant/quantize_4bit.py` gives the
same bytes ten times as fast. On a whole weight the library needs 11 (nf4) to 26 (fp4) bytes of scratch per
number: 0.7 to 1.5 GB for one MLP matrix of an 8B model. Blocks are independent, so chunks of whole blocks
give the same bytes, with the remainder of a row block carried into the next, and scratch stays below 64 MiB.

bitsandbytes casts a weight to fp16 before it quantizes to int8, and so does this module: bf16 and fp32
weights are rounded, and weights beyond 65504 are refused.

Double-quantized scales depend on the summation order of nested_offset, a mean. torch splits a sum over its
threads, so the library's last bits change with the number of threads beyond 2M numbers. Here (`_mean`) they
are always those of one thread, so that a quantized base has one fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_train.errors import BaseModelError
from qlora_train.quant.formats import NESTED_BLOCK_SIZE, Quantization
from qlora_train.quant.quantize_4bit import Quantizer4bit
from qlora_train.quant.weight import QuantizedWeight, quantized_layout
from qlora_train.units import ceil_div

CHUNK_ELEMENTS = 2**20  # numbers per call of the library's quantizer
QUANTIZABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    rows: Iterable[Tensor],
    shape: tuple[int, int],
    quantization: Quantization,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
    out: dict[str, Tensor] | None = None,
) -> QuantizedWeight:
    """Quantize a weight [out, in] given as consecutive blocks of rows, of any sizes.

    A block of rows may be overwritten once the next is requested. nf4 and fp4 quantize the numbers in their
    own dtype on `device`: the result has the bytes of
    `bitsandbytes.functional.quantize_4bit(whole, blocksize=64, compress_statistics=double_quant)`. int8 has
    those of `int8_vectorwise_quant(whole.to(float16))`. "none" casts to `dtype`, which is used only then.

    `out`: the tensors of `quantized_layout` to write into, such as views of a layer buffer; the result holds
    them, and `device` is ignored. None: they are allocated on `device`.

    Raises `BaseModelError`, naming `name`, for weights that are not finite, or are not 16- or 32-bit floats.
    """
    layout = quantized_layout(quantization, shape, dtype)
    tensors = out or {
        key: torch.empty(size, dtype=kind, device=device) for key, (kind, size) in layout.items()
    }
    found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    assert found == layout, f"{name}: quantizes into {layout}, not {found}"
    rows = checked_rows(rows, name)
    if quantization.is_4bit:
        num_elements, scales = _quantize_4bit(rows, quantization, tensors)
    elif quantization.format == "int8":
        num_elements, scales = _quantize_int8(rows, shape[1], tensors)
    else:
        num_elements, scales = _quantize_none(rows, tensors["data"])
    assert num_elements == math.prod(shape), (
        f"{name}: the row blocks hold {num_elements} numbers, not {shape}"
    )
    if not torch.isfinite(scales).all():
        raise BaseModelError(
            f"{name}: holds values that are not finite, or that float16 cannot hold "
            f"(quantized as {quantization.format}, dtype {dtype}). Use nf4, or bfloat16, or repair the "
            "checkpoint."
        )
    return QuantizedWeight(quantization, shape, tensors)


def checked_rows(rows: Iterable[Tensor], name: str) -> Iterator[Tensor]:
    """The blocks of a weight's rows. Raises `BaseModelError` for a dtype that is not quantized."""
    for block in rows:
        if block.dtype not in QUANTIZABLE_DTYPES:
            raise BaseModelError(
                f"{name}: has the dtype {block.dtype}; only float32, float16 and bfloat16 weights can be"
                " quantized. Convert the checkpoint to bfloat16 first."
            )
        yield block


def _quantize_4bit(
    rows: Iterable[Tensor], quantization: Quantization, tensors: dict[str, Tensor]
) -> tuple[int, Tensor]:
    data, device = tensors["data"], tensors["data"].device
    absmax = (
        torch.empty(tensors["absmax"].shape, device=device)
        if quantization.double_quant
        else tensors["absmax"]
    )
    block, done = quantization.block_size, 0
    quantize = _quantizer_4bit(quantization, device)
    for chunk in _whole_blocks(rows, block):
        stop = done + len(chunk)
        quantize(chunk, data[done // 2 : (stop + 1) // 2], absmax[done // block : ceil_div(stop, block)])
        done = stop
    if quantization.double_quant:
        _quantize_absmax(absmax, tensors)
        return done, tensors["nested_offset"]  # the mean: not finite if any absmax is not
    return done, absmax


def _quantizer_4bit(
    quantization: Quantization, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The function that quantizes a flat chunk into the tensors (data, absmax) on `device`."""
    if device.type == "cpu":
        return Quantizer4bit(
            bnb.get_4bit_type(quantization.format, device="cpu"), quantization.block_size
        ).quantize

    def quantize(chunk: Tensor, data: Tensor, absmax: Tensor) -> None:
        codes, state = bnb.quantize_4bit(
            chunk.to(device), blocksize=quantization.block_size, quant_type=quantization.format
        )
        data.copy_(codes.squeeze(1))
        absmax.copy_(state.absmax)

    return quantize


def _quantize_absmax(absmax: Tensor, tensors: dict[str, Tensor]) -> None:
    """Double quantization: quantize `absmax`, which is overwritten, into `tensors`."""
    offset = _mean(absmax)
    codes, state = bnb.quantize_blockwise(absmax.sub_(offset), blocksize=NESTED_BLOCK_SIZE)
    tensors["absmax"].copy_(codes)
    tensors["nested_absmax"].copy_(state.absmax)
    tensors["nested_offset"].copy_(offset)
    tensors["nested_code"].copy_(state.code)


def _mean(values: Tensor) -> Tensor:
    """`values.mean()` with the bits of one thread. On a CPU torch splits a single sum over its threads, but
    computes each of several sums in one thread; so the mean is computed twice in one call."""
    return values.expand(2, -1).mean(-1)[0] if values.device.type == "cpu" else values.mean()


def _whole_blocks(rows: Iterable[Tensor], block: int) -> Iterator[Tensor]:
    """Regroup blocks of rows into flat chunks of whole quantization blocks; only the last chunk may end
    within a block."""
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


def _quantize_int8(rows: Iterable[Tensor], columns: int, tensors: dict[str, Tensor]) -> tuple[int, Tensor]:
    data, row_absmax, done = tensors["data"], tensors["row_absmax"], 0
    for part in rows:
        for chunk in part.split(max(1, CHUNK_ELEMENTS // columns)):
            half = chunk.to(device=data.device, dtype=torch.float16)
            codes, scales, _ = bnb.int8_vectorwise_quant(half)
            data[done : done + len(chunk)] = codes
            row_absmax[done : done + len(chunk)] = scales
            done += len(chunk)
    return done * columns, row_absmax


def _quantize_none(rows: Iterable[Tensor], data: Tensor) -> tuple[int, Tensor]:
    done, largest = 0, []
    for part in rows:
        data[done : done + len(part)] = part.to(data.device)
        largest.append(data[done : done + len(part)].abs().amax())
        done += len(part)
    return done * data.shape[1], torch.stack(largest)
