"""One micro-batch on the compute device: a flat row of T tokens with its documents, labels and identities."""

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
    """Tensors of one micro-batch; T packed tokens, S supervised ones.

    ids: the tokens [T]. position_ids: int64 [1, T]. labels: int64 [T], the token to predict at each place,
    -100 where none is. supervised: int64 [S], the places with a label; label_ids: the labels there [S]. rows,
    offsets: int64 [T], identity of each token in the data order.
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
        """The same with every device tensor replaced by move(tensor): pinned, or on another device."""
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

    @property
    def token_ids(self) -> Tensor:
        """int64 [1, T] on the device."""
        return self.ids.device[None]
