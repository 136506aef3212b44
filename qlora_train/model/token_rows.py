"""An embedding or head in which the rows of a few tokens are trained, and all others are frozen.

As PEFT's `trainable_token_indices`: the trained rows stand in the place of the stored matrix's own, and
tokens that are new to the model have theirs behind its end. Wherever the stored matrix is (on the device, in
RAM, on disk), it is only read; the rows are views of the flat buffers of all trained parameters
(lora_parameters.py). Where embedding and head are tied, both are one object, and both gradients add up.

Bytes: a copy of each tile of the head that holds a trained row, while it is processed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from qlora_train.errors import BaseModelError, UnsupportedModelError
from qlora_train.model.quantized_matrix import QuantizedMatrix
from qlora_train.model.vocab_matrix import TokenIds, VocabMatrix


class TokenRows:
    """A `VocabMatrix`: `stored`, with `rows` [n, D] for the n tokens `ids`.

    ids: ascending. gradient: fp32 [n, D], which `add_gradient` adds to; None: the rows are not trained.
    Raises `UnsupportedModelError` for a quantized matrix, `BaseModelError` where tokens beyond the stored
    matrix leave a gap."""

    def __init__(
        self, stored: VocabMatrix, ids: Sequence[int], rows: Tensor, gradient: Tensor | None = None
    ) -> None:
        if isinstance(stored, QuantizedMatrix):
            raise UnsupportedModelError(
                "model.add_tokens: the checkpoint has its head quantized, and the tokens' rows cannot be "
                "trained in it. Use the same model in 16 bits, or leave add_tokens out"
            )
        self.stored, self.rows, self.gradient = stored, rows, gradient
        self.num_rows, self.tile_rows = max(stored.num_rows, ids[-1] + 1), stored.tile_rows
        self.items = stored.items
        self._host_ids = np.array(ids, dtype=np.int64)
        self.ids = torch.tensor(self._host_ids, device=rows.device)
        if len(self._host_ids) - bisect_left(ids, stored.num_rows) != self.num_rows - stored.num_rows:
            raise BaseModelError(
                f"model.add_tokens: the tokenizer numbers new tokens up to {ids[-1]}, but the model's "
                f"embedding has {stored.num_rows} rows, fewer than the tokenizer has tokens already. Check "
                "that tokenizer and weights belong together."
            )

    def gather(self, ids: TokenIds) -> Tensor:
        places = self._places(ids)
        is_trained = places.any(0)
        others = TokenIds(
            np.where(np.isin(ids.host, self._host_ids), 0, ids.host), ids.device.masked_fill(is_trained, 0)
        )
        trained = self.rows[places.int().argmax(0)]
        return torch.where(is_trained[:, None], trained, self.stored.gather(others))

    @contextmanager
    def tile(self, index: int) -> Iterator[Tensor]:
        start = index * self.tile_rows
        stop = min(start + self.tile_rows, self.num_rows)
        here = slice(*(bisect_left(self._host_ids, end) for end in (start, stop)))
        with self._stored_tile(index) as rows:
            if here.start < here.stop:
                filled = rows.new_empty(stop - start, rows.shape[1])
                filled[: len(rows)] = rows
                rows = filled.index_copy_(0, self.ids[here] - start, self.rows[here])
            yield rows

    def add_gradient(self, ids: TokenIds, gradient: Tensor) -> None:
        """Add the gradient [n, D] of the gathered rows of `ids`."""
        assert self.gradient is not None
        self.gradient.addmm_(self._places(ids).float(), gradient.float())  # a sum in a fixed order

    def _places(self, ids: TokenIds) -> Tensor:
        """Which of the rows each token has: bool [rows, tokens]."""
        return self.ids[:, None] == ids.device

    def _stored_tile(self, index: int) -> AbstractContextManager[Tensor]:
        if index * self.tile_rows < self.stored.num_rows:
            return self.stored.tile(index)
        return nullcontext(self.rows[:0])


def initial_rows(stored: VocabMatrix, parts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The rows [n, D] that n tokens begin with, in fp32: the mean of the rows of the tokens that each one's
    text was split into before. parts: the ids of those."""
    gathered = stored.gather(TokenIds.of(np.concatenate(parts), device)).float()
    return torch.stack([rows.mean(0) for rows in gathered.split([len(ids) for ids in parts])])


def blocks_with_rows(blocks: Iterator[Tensor], ids: Sequence[int], rows: Tensor) -> Iterator[Tensor]:
    """Consecutive blocks of rows of a stored matrix, with the `rows` of `ids` (ascending) in the place of its
    own, then those behind its end."""
    start = first = 0
    for block in blocks:
        end = bisect_left(ids, start + len(block))
        if first < end:
            block = block.clone()
            block[torch.tensor(ids[first:end]) - start] = rows[first:end].to(block)
        yield block
        start, first, kind = start + len(block), end, block
    if first < len(ids):
        yield rows[first:].to(kind)
