"""Embedding and head [V, D] in the compute dtype, read by rows or tiles; one object if they are tied.

They are the largest matrices of a model (Llama 3: 128,256 x 4,096, 1.05 GB in 16 bits, against 0.11 GB for a
quantized layer) and the least used: T tokens need T embedding rows, and the loss can process the head a few
thousand rows at a time. So both are read in parts only:

    gather(ids)       rows [n, D] of n token ids: input embeddings, and the head's rows of the labels
    tile(j)           rows of tile j [rows, D]: the head's product, tile by tile (model/loss.py)

A head that is quantized in the checkpoint has this interface too, dequantized by part (quantized_matrix.py).

Why tiles for a resident matrix too: the loss is then the same arithmetic wherever the matrix is stored, so
its placement changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenIds:
    """Token ids int64 [n] twice: on the host, to index a matrix in RAM or on disk, and on the device."""

    host: np.ndarray
    device: Tensor

    @staticmethod
    def of(ids: np.ndarray, device: torch.device | str) -> TokenIds:
        host = np.ascontiguousarray(ids, dtype=np.int64)
        return TokenIds(host, torch.from_numpy(host).to(device, non_blocking=True))

    def moved(self, move: Callable[[Tensor], Tensor]) -> TokenIds:
        """A copy with the device ids replaced by move(ids)."""
        return TokenIds(self.host, move(self.device))

    def __len__(self) -> int:
        return len(self.host)


class VocabMatrix(Protocol):
    """A matrix [V, D], V = num_rows, read by rows or by tiles of `tile_rows` rows.

    items: the items of a `WeightStore` schedule that a pass over the tiles visits; empty if not streamed."""

    num_rows: int
    tile_rows: int
    items: tuple[int, ...]

    def gather(self, ids: TokenIds) -> Tensor:
        """The rows [n, D] of `ids`, on the device."""
        ...

    def tile(self, index: int) -> AbstractContextManager[Tensor]:
        """Context with the rows of tile `index` [rows, D] on the device, valid inside only."""
        ...


def tile_starts(matrix: VocabMatrix) -> range:
    """The first row of every tile."""
    return range(0, matrix.num_rows, matrix.tile_rows)


class ResidentMatrix:
    """A `VocabMatrix` that stays on the compute device."""

    items: tuple[int, ...] = ()

    def __init__(self, weight: Tensor, tile_rows: int) -> None:
        self.weight = weight
        self.num_rows, self.tile_rows = weight.shape[0], tile_rows

    def gather(self, ids: TokenIds) -> Tensor:
        return self.weight[ids.device]

    def tile(self, index: int) -> AbstractContextManager[Tensor]:
        return nullcontext(self.weight[index * self.tile_rows : (index + 1) * self.tile_rows])


def tiles(matrix: VocabMatrix) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, D]) of every tile in turn, each valid until the next."""
    for index, start in enumerate(tile_starts(matrix)):
        with matrix.tile(index) as rows:
            yield start, rows


def whole(matrix: VocabMatrix) -> Tensor:
    """The whole matrix [V, D] on the device, for reference runs."""
    if isinstance(matrix, ResidentMatrix):
        return matrix.weight
    filled: Tensor | None = None
    for start, rows in tiles(matrix):
        if filled is None:
            filled = rows.new_empty(matrix.num_rows, rows.shape[1])
        filled[start : start + len(rows)] = rows
    assert filled is not None
    return filled
