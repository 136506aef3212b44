"""The bytes of the fast 4-bit quantizer and of its reference against bitsandbytes, on hard numbers."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_train.quant import quantize_4bit
from qlora_train.quant.quantize_4bit import (
    CELL_BITS,
    MIXED,
    Quantizer4bit,
    midpoints,
    quantize_4bit_reference,
)

CODES = {form: bnb.get_4bit_type(form, device="cpu") for form in ("nf4", "fp4")}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def around(values: torch.Tensor) -> torch.Tensor:
    """Every value, and the float32 numbers next to it."""
    up, down = (torch.nextafter(values, torch.tensor(side)) for side in (torch.inf, -torch.inf))
    return torch.cat([values, up, down])


def with_absmax(x: torch.Tensor, absmax: float, block_size: int) -> torch.Tensor:
    """Blocks whose absolute maximum is `absmax` and whose other numbers are x * absmax, flat."""
    padding = -len(x) % (block_size - 1)
    rows = torch.cat([x, torch.zeros(padding)]).view(-1, block_size - 1)
    return torch.cat([torch.ones(len(rows), 1), rows], dim=1).view(-1) * absmax


def hard_numbers(form: str, block_size: int) -> torch.Tensor:
    """float32: midpoints at many scales, zeros of both signs, subnormal and huge blocks."""
    generator = torch.Generator().manual_seed(0)
    bounds, _ = midpoints(CODES[form])
    x = around(bounds)
    scales = [1.0, 0.25, 0.0173, 3.0, 6.1e4, 6.1e-5, 1.1e-38, 1.0e-38, 9e-39, 1e-40, 7e-45, 1.7e38, 3.4e38]
    special = torch.zeros(4, block_size)
    special[1] = -0.0
    special[2, 3], special[3, 5] = 2.0**-149, -1.0
    return torch.cat(
        [with_absmax(x, scale, block_size) for scale in scales]
        + [special.view(-1)]
        + [torch.randn(block_size, generator=generator) * 10.0**power for power in range(-46, 38)]
    )


def check(flat: torch.Tensor, form: str, block_size: int) -> None:
    data, state = bnb.quantize_4bit(flat, blocksize=block_size, quant_type=form)
    quantized = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-len(flat) // block_size))
    Quantizer4bit(CODES[form], block_size).quantize(flat, quantized, absmax)
    assert torch.equal(quantized, data.view(-1))
    assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))
    quantized, absmax = quantize_4bit_reference(flat, CODES[form], block_size)
    assert torch.equal(quantized, data.view(-1))
    assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_hard_numbers_have_the_bytes_of_bitsandbytes(form, dtype, block_size, monkeypatch) -> None:
    monkeypatch.setattr(quantize_4bit, "CACHE_CHUNK_ELEMENTS", 8192)
    flat = hard_numbers(form, block_size).to(dtype)
    flat = flat[: len(flat) // block_size * block_size]
    flat = torch.where(flat.isfinite(), flat, 1.0).to(dtype)  # float16 cannot hold the huge ones
    check(flat, form, block_size)
    for num_left in (1, 7, 18, block_size - 1):  # of the last block
        check(flat[: num_left - block_size], form, block_size)
        check(flat[:num_left], form, block_size)


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_cell_ends_have_the_bytes_of_bitsandbytes(form) -> None:
    ends = (torch.arange(-(2**CELL_BITS), 2**CELL_BITS) + 0.5) * 2.0**-CELL_BITS
    for absmax in (1.0, 0.7):
        check(with_absmax(around(ends), absmax, 64), form, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_every_16_bit_number_has_the_bytes_of_bitsandbytes(form, dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    shuffled = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(1))]
    for flat in (finite, shuffled):
        check(flat, form, 64)


@pytest.mark.parametrize("num_elements", [1, 2, 63, 64, 65, 8191, 8192, 8193, 3 * 8192 + 64 + 31])
def test_any_length_has_the_bytes_of_bitsandbytes(num_elements, monkeypatch) -> None:
    monkeypatch.setattr(quantize_4bit, "CACHE_CHUNK_ELEMENTS", 8192)
    flat = torch.randn(num_elements + 1, generator=torch.Generator().manual_seed(2))
    check(flat[1:], "nf4", 64)  # starts in the middle of a cache line


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite_show_in_absmax(bad) -> None:
    flat = torch.randn(2 * 64 + 5, generator=torch.Generator().manual_seed(3))
    flat[70] = bad
    quantized, absmax = torch.empty(67, dtype=torch.uint8), torch.empty(3)
    Quantizer4bit(CODES["nf4"], 64).quantize(flat, quantized, absmax)
    assert absmax.isfinite().tolist() == [True, False, True]
    data, _ = bnb.quantize_4bit(flat, blocksize=64, quant_type="nf4")
    assert torch.equal(quantized, data.view(-1))


def test_few_weights_need_the_search() -> None:
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(4)) / 2.5
    cells = (x[x.abs() <= 1] * 2**CELL_BITS + 2**CELL_BITS).round().int()
    mixed = quantize_4bit._cells(tuple(CODES["nf4"].tolist())) == MIXED
    assert mixed.sum() == 15
    assert mixed[cells].float().mean() < 3e-4
