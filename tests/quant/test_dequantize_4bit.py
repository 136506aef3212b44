"""The dequantizing kernel, interpreted on the CPU, and its reference against bitsandbytes: the same bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize as quantize_weight
from qlora_train.quant.weight import QuantizedWeight, _code_on

BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("qlora_train.quant.dequantize_4bit")


def quantize(kernels: ModuleType, num_elements: int, form: str, block_size: int, double_quant: bool):
    """Random numbers, quantized by bitsandbytes: ours and the library's view of the same bytes."""
    generator = torch.Generator().manual_seed(num_elements + block_size)
    flat = torch.randn(num_elements, generator=generator)
    flat *= 10 ** torch.linspace(-3, 3, num_elements)  # scales of many sizes
    data, state = bnb.quantize_4bit(
        flat, blocksize=block_size, quant_type=form, compress_statistics=double_quant
    )
    nested = None
    if double_quant:
        nested = kernels.NestedScales(state.state2.code, state.state2.absmax, state.offset)
    quantized = kernels.Quantized4bit(
        data.view(-1), state.absmax, _code_on(form, torch.device("cpu")), block_size, nested
    )
    return quantized, data, state


def bits(numbers: Tensor) -> Tensor:
    """All bits but the sign of zero: fp4 has two zeros, and the library's CPU kernels make of the second now
    one, now the other."""
    numbers = numbers + 0.0
    return numbers.reshape(-1).view(torch.int32 if numbers.dtype == torch.float32 else torch.int16)


def cut_off(numbers: Tensor) -> Tensor:
    """float32 -> bfloat16 as Triton's interpreter does it: the lower half is dropped."""
    return (numbers.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def check(
    kernels: ModuleType, quantized, expected: Tensor, start: int, stop: int, dtype: torch.dtype
) -> None:
    """Numbers start..stop against `expected`, float32, from kernel and reference; nothing beside them."""
    around = torch.full((stop - start + 14,), 7.0, dtype=dtype)
    kernels.dequantize_4bit_reference(quantized, around[8 : 8 + stop - start], start)
    assert torch.equal(bits(around[8:-6]), bits(expected[start:stop].to(dtype)))
    around.fill_(7.0)
    out = around[8 : 8 + stop - start]
    assert kernels.dequantize_4bit(quantized, out, start) is out
    exact = expected[start:stop]
    assert torch.equal(bits(out), bits(cut_off(exact) if dtype == torch.bfloat16 else exact.to(dtype)))
    assert (around[:8] == 7).all() and (around[len(around) - 6 :] == 7).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_has_the_bits_of_bitsandbytes(kernels, block_size, form, double_quant) -> None:
    num_elements = 258 * block_size - block_size // 2 + 3  # more than one block of scales, an odd tail
    quantized, data, state = quantize(kernels, num_elements, form, block_size, double_quant)
    expected = bnb.dequantize_4bit(data, state).view(-1)
    for start, stop in [(0, 1111), (256 * block_size - 45, 256 * block_size + 30)]:
        check(kernels, quantized, expected, start, stop, torch.float32)
    for dtype in DTYPES:
        check(kernels, quantized, expected, num_elements - 70, num_elements, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("start", "num_elements"),
    [(0, 1), (0, 2), (0, 1023), (0, 1024), (0, 1025), (0, 4096), (1, 1), (1, 1024), (31, 2), (1023, 2)]
    + [(64, 1984), (333, 3333)],
)
def test_any_range_has_the_bits_of_bitsandbytes(kernels, start, num_elements, dtype) -> None:
    sizes = [start + num_elements] + [5001] * (dtype == torch.float32)  # without and with numbers behind
    for whole in sizes:
        quantized, data, state = quantize(kernels, whole, "nf4", 64, True)
        expected = bnb.dequantize_4bit(data, state).view(-1)
        check(kernels, quantized, expected, start, start + num_elements, dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_a_quantized_weight_is_dequantized_by_it(kernels, monkeypatch, form, double_quant) -> None:
    monkeypatch.setitem(sys.modules, "qlora_train.quant.dequantize_4bit", kernels)
    weight = torch.randn(37, 130, generator=torch.Generator().manual_seed(0))
    quantized: QuantizedWeight = quantize_weight([weight], (37, 130), Quantization(form, double_quant))
    for dtype in (torch.float32, torch.float16):
        out = torch.empty(37, 130, dtype=dtype)
        assert quantized.dequantize_into(out, "triton") is out
        assert torch.equal(bits(out), bits(quantized.dequantize(dtype)))
        some = quantized.dequantize_into(torch.empty(9, 130, dtype=dtype), "triton", 11)
        assert torch.equal(bits(some), bits(out[11:20]))


@pytest.mark.parametrize("columns", [64, 130])
def test_some_rows_are_those_of_the_whole(columns: int) -> None:
    weight = torch.randn(37, columns, generator=torch.Generator().manual_seed(0))
    quantized: QuantizedWeight = quantize_weight([weight], (37, columns), Quantization("nf4", True))
    some = quantized.dequantize_into(torch.empty(9, columns), "parts", 11)
    assert torch.equal(bits(some), bits(quantized.dequantize(torch.float32)[11:20]))


def test_places_of_64_bits_make_the_same(kernels, monkeypatch) -> None:
    """Real ones, beyond 2^31, are for tests/gpu: the interpreter copies all it is given."""
    monkeypatch.setattr(kernels, "WIDE_FROM", 0)
    quantized, data, state = quantize(kernels, 9001, "nf4", 32, True)
    expected = bnb.dequantize_4bit(data, state).view(-1)
    for start, stop in [(0, 1024), (1000, 3300), (8100, 9001)]:
        check(kernels, quantized, expected, start, stop, torch.float32)


def test_the_reference_beyond_2_to_the_31(kernels) -> None:
    start, num_elements = 2**31 - 37, 1100
    num_bytes = (start + num_elements + 1) // 2
    data = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))  # numpy's zeros take no memory until written
    data[start // 2 :] = torch.randint(256, (len(data) - start // 2,))
    absmax = torch.linspace(0.1, 3, -(-2 * len(data) // 4096))
    quantized = kernels.Quantized4bit(data, absmax, _code_on("nf4", torch.device("cpu")), 4096)
    codes = torch.stack([data[start // 2 :] >> 4, data[start // 2 :] & 15], dim=1).view(-1).int()
    scales = absmax[torch.arange(start, start + num_elements) // 4096]
    expected = quantized.code[codes[1 : 1 + num_elements]] * scales  # `start` is odd
    out = kernels.dequantize_4bit_reference(quantized, torch.empty(num_elements), start)
    assert torch.equal(out, expected)


def test_the_range_must_be_there(kernels) -> None:
    quantized, _, _ = quantize(kernels, 100, "nf4", 64, False)
    for start, num_elements in [(0, 101), (-1, 4), (99, 2)]:
        with pytest.raises(AssertionError):
            kernels.dequantize_4bit(quantized, torch.empty(num_elements), start)
    assert kernels.dequantize_4bit(quantized, torch.empty(0), 7).numel() == 0
