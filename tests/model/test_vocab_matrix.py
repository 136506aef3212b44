"""Embedding and head by parts: rows of tokens, tiles of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_train.model.vocab_matrix import ResidentMatrix, TokenIds, tile_starts, tiles, whole

SHAPES = [(1, 1), (23, 7), (40, 5)]
TILE_ROWS = [1, 4, 20, 22, 23, 24, 1000]
IDS = [[0], [0, 0, 0], [22, 3, 3, 0, 22, 5, 3], list(range(23)), []]


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


class Elsewhere:
    """A `VocabMatrix` whose one buffer holds a tile only while it is used, NaN otherwise."""

    items = (3, 4, 5)

    def __init__(self, weight: Tensor, tile_rows: int) -> None:
        self._weight = weight
        self.num_rows, self.tile_rows = weight.shape[0], tile_rows
        self._slot = torch.full((tile_rows, weight.shape[1]), float("nan"), dtype=weight.dtype)
        self.num_open = 0

    def gather(self, ids: TokenIds) -> Tensor:
        return self._weight[torch.from_numpy(ids.host)]

    @contextmanager
    def tile(self, index: int) -> Iterator[Tensor]:
        assert self.num_open == 0
        self.num_open += 1
        rows = self._weight[index * self.tile_rows :][: self.tile_rows]
        self._slot[: len(rows)] = rows
        try:
            yield self._slot[: len(rows)]
        finally:
            self._slot.fill_(float("nan"))
            self.num_open -= 1


@pytest.mark.parametrize(
    "ids",
    [
        np.array([3, 1, 3], dtype=np.int32),
        np.arange(20)[::-3],
        np.array([], dtype=np.int64),
        np.array([7], dtype=np.uint16),
    ],
    ids=["int32", "strided", "none", "uint16"],
)
def test_ids_are_the_same_on_both_sides(ids: np.ndarray) -> None:
    both = TokenIds.of(ids, "cpu")
    assert both.host.dtype == np.int64 and both.host.flags.c_contiguous
    assert both.device.dtype == torch.int64
    assert both.host.tolist() == both.device.tolist() == ids.tolist()
    assert len(both) == len(ids)


@pytest.mark.parametrize("kind", [ResidentMatrix, Elsewhere])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids", IDS, ids=str)
def test_rows_of_tokens(kind: type, dtype: torch.dtype, ids: list[int]) -> None:
    weight = matrix((23, 7), dtype)
    rows = kind(weight, 4).gather(TokenIds.of(np.array(ids, dtype=np.int64), "cpu"))
    assert rows.dtype == dtype and rows.shape == (len(ids), 7)
    assert all(torch.equal(row, weight[i]) for row, i in zip(rows, ids, strict=True))


@pytest.mark.parametrize("kind", [ResidentMatrix, Elsewhere])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_tiles_are_all_rows_once_and_in_order(kind: type, shape: tuple[int, int], tile_rows: int) -> None:
    weight = matrix(shape)
    source = kind(weight, tile_rows)
    next_row = 0
    for start, rows in tiles(source):
        assert start == next_row and 1 <= len(rows) <= tile_rows
        assert len(rows) == tile_rows or start + len(rows) == shape[0]  # only the last one is ragged
        assert torch.equal(rows, weight[start : start + len(rows)])
        next_row += len(rows)
    assert next_row == source.num_rows == shape[0]
    assert list(tile_starts(source)) == [start for start, _ in tiles(source)]


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_all_rows_at_once(tile_rows: int) -> None:
    weight = matrix((23, 7), torch.bfloat16)
    assert whole(ResidentMatrix(weight, tile_rows)) is weight
    filled = whole(Elsewhere(weight, tile_rows))
    assert filled.dtype == weight.dtype and torch.equal(filled, weight)


def test_a_resident_tile_is_a_view_and_has_nothing_to_visit() -> None:
    weight = matrix((23, 7))
    resident = ResidentMatrix(weight, 10)
    assert resident.items == ()
    with resident.tile(2) as rows:
        assert rows.shape == (3, 7) and rows.data_ptr() == weight[20].data_ptr()


def test_a_tile_is_left_before_the_next_and_when_the_loop_breaks_off() -> None:
    source = Elsewhere(matrix((23, 7)), 4)
    for start, _ in tiles(source):
        assert source.num_open == 1
        if start == 8:
            break
    del _
    loop = tiles(source)
    assert source.num_open == 0  # the broken loop's generator is gone
    next(loop)
    loop.close()
    assert source.num_open == 0
    with pytest.raises(ZeroDivisionError):
        for _start, _rows in tiles(source):
            raise ZeroDivisionError
