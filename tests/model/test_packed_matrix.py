"""A packed head by parts: whatever part is asked for has the bits that bitsandbytes unpacks the whole to."""

from __future__ import annotations

from functools import cache

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_train.memory.plan.packed_sizes import PackingSizes
from qlora_train.model.packed_matrix import PackedMatrix, RowFormat, as_token_matrix, packing_of_rows
from qlora_train.model.quantize import PackedWeight, Packing, pack
from qlora_train.model.token_matrix import ResidentMatrix, TokenIds, tiles, whole

NUM_ROWS = 301
CASES = [  # packing, D: rows of 1 and 3 blocks; 903 scales, whose blocks of 256 end inside a row
    (Packing("nf4"), 192),
    (Packing("nf4", double_quant=True), 192),
    (Packing("nf4", double_quant=True), 64),
    (Packing("fp4"), 192),
    (Packing("fp4", double_quant=True), 192),
    (Packing("nf4", double_quant=True, block_size=128), 128),
    (Packing("int8"), 192),
    (Packing("int8"), 63),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = [[0], [7, 7, 7], [300, 3, 255, 3, 0, 300, 85, 86], list(range(301)), []]
over_cases = pytest.mark.parametrize(("packing", "num_columns"), CASES, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache
def packed_weight(packing: Packing, num_columns: int) -> PackedWeight:
    """By our quantiser, whose bytes are bitsandbytes'."""
    weight = torch.randn(NUM_ROWS, num_columns, generator=torch.Generator().manual_seed(num_columns))
    return pack([weight], (NUM_ROWS, num_columns), packing)


def unpacked_by_bitsandbytes(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    t, packing = weight.tensors, weight.packing
    if packing.format == "int8":
        return bnb.int8_vectorwise_dequant(t["data"], t["row_absmax"]).to(dtype)
    nested = None
    if packing.double_quant:
        nested = bnb.QuantState(t["nested_absmax"], code=t["nested_code"], blocksize=256, dtype=torch.float32)
    state = bnb.QuantState(
        t["absmax"],
        shape=torch.Size(weight.shape),
        code=bnb.get_4bit_type(packing.format, device="cpu"),
        blocksize=packing.block_size,
        quant_type=packing.format,
        dtype=dtype,
        offset=t.get("nested_offset"),
        state2=nested,
    )
    return bnb.dequantize_4bit(t["data"].unsqueeze(1), state)


def stored(weight: PackedWeight, dtype: torch.dtype, step: int = 50) -> tuple[RowFormat, Tensor]:
    """Format and rows, stored a few at a time."""
    row_format = RowFormat(packing_of_rows(weight.packing, weight.shape[1]), weight.shape[1], dtype)
    parts = [
        row_format.store(weight, start, min(start + step, NUM_ROWS)) for start in range(0, NUM_ROWS, step)
    ]
    return row_format, torch.cat(parts)


def matrix(weight: PackedWeight, dtype: torch.dtype, tile_rows: int) -> PackedMatrix:
    row_format, rows = stored(weight, dtype)
    return PackedMatrix(ResidentMatrix(rows, tile_rows), row_format, "parts")


@over_cases
@over_dtypes
@pytest.mark.parametrize("tile_rows", [1, 50, 300, 301, 1000])
def test_tiles_are_the_rows_of_the_unpacked_matrix(
    packing: Packing, num_columns: int, dtype: torch.dtype, tile_rows: int
) -> None:
    weight = packed_weight(packing, num_columns)
    expected = unpacked_by_bitsandbytes(weight, dtype)
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
def test_rows_of_labels_are_those_of_the_unpacked_matrix(
    packing: Packing, num_columns: int, dtype: torch.dtype, ids: list[int]
) -> None:
    weight = packed_weight(packing, num_columns)
    rows = matrix(weight, dtype, 50).gather(TokenIds.of(np.array(ids, dtype=np.int64), "cpu"))
    assert rows.dtype == dtype and rows.shape == (len(ids), num_columns)
    assert torch.equal(rows, unpacked_by_bitsandbytes(weight, dtype)[ids])


def test_tiles_share_one_buffer() -> None:
    source = matrix(packed_weight(*CASES[0]), torch.bfloat16, 100)
    with source.tile(0) as first, source.tile(2) as third, source.tile(3) as last:
        assert first.data_ptr() == third.data_ptr() == last.data_ptr()
        assert (len(first), len(third), len(last)) == (100, 100, 1)


def test_rows_that_are_not_whole_blocks_cannot_be_stored_one_by_one() -> None:
    assert packing_of_rows(Packing("nf4", True), 96) == Packing("none")
    assert packing_of_rows(Packing("fp4", block_size=128), 192) == Packing("none")
    assert packing_of_rows(Packing("fp4", True, 128), 256) == Packing("fp4", False, 128)
    assert packing_of_rows(Packing("int8"), 96) == Packing("int8")


def test_rows_that_are_not_packed_are_a_matrix_as_it_is() -> None:
    row_format = RowFormat(Packing("none"), 10, torch.bfloat16)
    assert (row_format.stored_columns, row_format.stored_dtype, row_format.row_bytes) == (
        10,
        torch.bfloat16,
        20,
    )
    resident = ResidentMatrix(torch.ones(4, 10), 2)
    assert as_token_matrix(resident, row_format, "parts") is resident


@over_cases
def test_the_planner_knows_the_bytes_of_a_row(packing: Packing, num_columns: int) -> None:
    if packing.block_size != 64:
        return  # which config.json cannot say, so the planner cannot know
    row_format, rows = stored(packed_weight(packing, num_columns), torch.bfloat16)
    planned = PackingSizes(packing.format, False, 2).row_bytes(num_columns)
    assert planned == row_format.row_bytes == rows.nbytes / NUM_ROWS
    assert PackingSizes("none", False, 2).row_bytes(num_columns) == 2 * num_columns
