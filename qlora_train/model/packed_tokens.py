"""One micro-batch on the compute device: a flat row of T tokens with documents, labels and dropout keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlora_train.micro_batch import MicroBatch
from qlora_train.model.attention import DocumentLayout
from qlora_train.model.vocab_matrix import TokenIds


@dataclass(frozen=True)
class PackedTokens:
    """The tensors of one micro-batch with T packed tokens, S of them supervised.

    ids: the tokens [T]. position_ids: int64 [1, T]. labels: int64 [T], the token to predict at each position,
    -100 for none. supervised: int64 [S], the positions with a label; label_ids: their labels [S]. rows,
    offsets: int64 [T], row of each token in the data order and its offset in that row.
    """

    ids: TokenIds
    position_ids: Tensor
    documents: DocumentLayout
    labels: Tensor
    supervised: Tensor
    label_ids: TokenIds
    rows: Tensor
    offsets: Tensor

    @staticmethod
    def from_host(batch: MicroBatch, device: torch.device | str) -> PackedTokens:
        """Copy a micro-batch to the device."""

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device, non_blocking=True)

        supervised = batch.supervised_positions
        return PackedTokens(
            TokenIds.of(batch.token_ids, device),
            put(batch.position_ids)[None],
            DocumentLayout.of(batch.cu_seqlens, device),
            put(batch.labels),
            put(supervised),
            TokenIds.of(batch.labels[supervised], device),
            put(batch.row_ids),
            put(batch.token_offsets),
        )

    def moved(self, move: Callable[[Tensor], Tensor]) -> PackedTokens:
        """A copy with every device tensor replaced by move(tensor), e.g. pinned or on another device."""
        return PackedTokens(
            self.ids.moved(move),
            move(self.position_ids),
            self.documents.moved(move),
            move(self.labels),
            move(self.supervised),
            self.label_ids.moved(move),
            move(self.rows),
            move(self.offsets),
        )

    def tensors(self) -> list[Tensor]:
        """Every device tensor, in the order in which `moved` takes them."""
        taken: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            taken.append(tensor)
            return tensor

        self.moved(take)
        return taken

    @property
    def token_ids(self) -> Tensor:
        """Token ids int64 [1, T] on the device."""
        return self.ids.device[None]
