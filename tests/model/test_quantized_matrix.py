"""A quantized head by parts: whatever part is asked for has the bits that bitsandbytes dequantizes the whole
to."""

from __future__ import annotations

from functools import cache

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_train.model.quantized_matrix import (
    QuantizedMatrix,
    RowLayout,
    as_vocab_matrix,
)
from qlora_train.model.vocab_matrix import ResidentMatrix, TokenIds, tiles, whole
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.quant.weight import QuantizedWeight

NUM_ROWS = 301
CASES = [  # quantization, D: rows of 1 and 3 blocks; 903 scales, whose blocks of 256 end inside a row
    (Quantization("nf4"), 192),
    (Quantization("nf4", double_quant=True), 192),
    (Quantization("nf4", double_quant=True), 64),
    (Quantization("fp4"), 192),
    (Quantization("fp4", double_quant=True), 192),
    (Quantization("nf4", double_quant=True, block_size=128), 128),
    (Quantization("int8"), 192),
    (Quantization("int8"), 63),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = [[0], [7, 7, 7], [300, 3, 255, 3, 0, 300, 85, 86], list(range(301)), []]
over_cases = pytest.mark.parametrize(("quantization", "num_columns"), CASES, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache
def quantized_weight(quantization: Quantization, num_columns: int) -> QuantizedWeight:
    """By our quantizer, whose bytes are bitsandbytes'."""
    weight = torch.randn(NUM_ROWS, num_columns, generator=torch.Generator().manual_seed(num_columns))
    return quantize([weight], (NUM_ROWS, num_columns), quantization)


def dequantized_by_bitsandbytes(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    t, quantization = weight.tensors, weight.quantization
    if quantization.format == "int8":
        return bnb.int8_vectorwise_dequant(t["data"], t["row_absmax"]).to(dtype)
    nested = None
    if quantization.double_quant:
        nested = bnb.QuantState(t["nested_absmax"], code=t["nested_code"], blocksize=256, dtype=torch.float32)
    state = bnb.QuantState(
        t["absmax"],
        shape=torch.Size(weight.shape),
        code=bnb.get_4bit_type(quantization.format, device="cpu"),
        blocksize=quantization.block_size,
        quant_type=quantization.format,
        dtype=dtype,
        offset=t.get("nested_offset"),
        state2=nested,
    )
    return bnb.dequantize_4bit(t["data"].unsqueeze(1), state)


def stored(weight: QuantizedWeight, dtype: torch.dtype, step: int = 50) -> tuple[RowLayout, Tensor]:
    """Format and rows, stored a few at a time."""
    row_format = RowLayout(weight.quantization.by_row(weight.shape[1]), weight.shape[1], dtype)
    parts = [
        row_format.store(weight, start, min(start + step, NUM_ROWS)) for start in range(0, NUM_ROWS, step)
    ]
    return row_format, torch.cat(parts)


def matrix(weight: QuantizedWeight, dtype: torch.dtype, tile_rows: int) -> QuantizedMatrix:
    row_format, rows = stored(weight, dtype)
    return QuantizedMatrix(ResidentMatrix(rows, tile_rows), row_format, "parts")


@over_cases
@over_dtypes
@pytest.mark.parametrize("tile_rows", [1, 50, 300, 301, 1000])
def test_tiles_are_the_rows_of_the_dequantized_matrix(
    quantization: Quantization, num_columns: int, dtype: torch.dtype, tile_rows: int
) -> None:
    weight = quantized_weight(quantization, num_columns)
    expected = dequantized_by_bitsandbytes(weight, dtype)
    assert expected.float().std() > 0.5
    source, next_row = matrix(weight, dtype, tile_rows), 0
    for start, rows in tiles(source):
        assert start == next_row and rows.dtype == dtype and rows.is_contiguous()
        assert torch.equal(rows, expected[start : start + tile_rows])
        next_row += len(rows)
    assert next_row == source.num_rows == NUM_ROWS
    assert torch.equal(whole(source), expected)


@over_cases
@over_dtypes
@pytest.mark.parametrize("ids", IDS, ids=lambda ids: str(ids[:3]))
def test_rows_of_labels_are_those_of_the_dequantized_matrix(
    quantization: Quantization, num_columns: int, dtype: torch.dtype, ids: list[int]
) -> None:
    weight = quantized_weight(quantization, num_columns)
    rows = matrix(weight, dtype, 50).gather(TokenIds.of(np.array(ids, dtype=np.int64), "cpu"))
    assert rows.dtype == dtype and rows.shape == (len(ids), num_columns)
    assert torch.equal(rows, dequantized_by_bitsandbytes(weight, dtype)[ids])


def test_tiles_share_one_buffer() -> None:
    source = matrix(quantized_weight(*CASES[0]), torch.bfloat16, 100)
    with source.tile(0) as first, source.tile(2) as third, source.tile(3) as last:
        assert first.data_ptr() == third.data_ptr() == last.data_ptr()
        assert (len(first), len(third), len(last)) == (100, 100, 1)


def test_rows_that_are_not_whole_blocks_cannot_be_stored_one_by_one() -> None:
    assert Quantization("nf4", True).by_row(96) == Quantization("none")
    assert Quantization("fp4", block_size=128).by_row(192) == Quantization("none")
    assert Quantization("fp4", True, 128).by_row(256) == Quantization("fp4", False, 128)
    assert Quantization("int8").by_row(96) == Quantization("int8")


def test_rows_that_are_not_quantized_are_a_matrix_as_it_is() -> None:
    row_format = RowLayout(Quantization("none"), 10, torch.bfloat16)
    assert (row_format.stored_columns, row_format.stored_dtype, row_format.row_bytes) == (
        10,
        torch.bfloat16,
        20,
    )
    resident = ResidentMatrix(torch.ones(4, 10), 2)
    assert as_vocab_matrix(resident, row_format, "parts") is resident
