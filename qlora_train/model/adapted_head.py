"""A head with LoRA parameters A and B on it: rows W[ids] + s B[ids] A, computed on request.

Adapters of other tools may hold A and B for `lm_head`. They are applied and stay frozen: the loss reads the
head once, tile by tile (loss.py), and their gradient would need every tile a second time. The input embedding
is unchanged even if it is the same matrix (tied): LoRA belongs to the module.

Bytes: one additional tile on the device, [tile_rows, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora_train.errors import BaseModelError
from qlora_train.model.vocab_matrix import TokenIds, VocabMatrix, tiles


class AdaptedHead:
    """A `VocabMatrix` [V, D]: `stored` + scaling b a. a [R, D], b [V, R]: fp32, on the device of the rows."""

    def __init__(self, stored: VocabMatrix, a: Tensor, b: Tensor, scaling: float) -> None:
        self.stored, self._a, self._b, self._scaling = stored, a, b, scaling
        self.num_rows, self.tile_rows, self.items = stored.num_rows, stored.tile_rows, stored.items

    @staticmethod
    def of(
        stored: VocabMatrix,
        lora: tuple[Tensor, ...],
        scaling: float,
        device: torch.device,
        made_for: Tensor | None,
    ) -> AdaptedHead:
        """Build an `AdaptedHead` after checks; arguments and errors as in `FrozenDecoder.adapt_head`."""
        a, b = (matrix.to(device, torch.float32) for matrix in lora)
        for start, rows in tiles(stored):
            expected = None if made_for is None else made_for[start : start + len(rows)].to(rows)
            if len(b) != stored.num_rows or a.shape[1] != rows.shape[1]:
                found = f"[{len(b)}, {a.shape[1]}]"
                raise BaseModelError(
                    f"the adapter's A and B on lm_head make a {found} weight, this base's head is "
                    f"[{stored.num_rows}, {rows.shape[1]}]"
                )
            if expected is not None and not torch.equal(expected, rows):
                raise BaseModelError(
                    "the adapter brings an lm_head of its own, which is not this base's; merge it into its "
                    "base with peft, and train on the merged model"
                )
        return AdaptedHead(stored, a, b, scaling)

    def gather(self, ids: TokenIds) -> Tensor:
        return self._adapted(self.stored.gather(ids), self._b[ids.device])

    @contextmanager
    def tile(self, index: int) -> Iterator[Tensor]:
        start = index * self.tile_rows
        with self.stored.tile(index) as rows:
            adapted = self._adapted(rows, self._b[start : start + len(rows)])
        yield adapted

    def _adapted(self, rows: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(rows.float(), b, self._a, alpha=self._scaling).to(rows.dtype)
