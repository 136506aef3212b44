"""One micro-batch on the compute device: a flat row of T tokens with its documents, labels and identities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qlora_train.model.attention import DocumentLayout
from qlora_train.model.token_matrix import TokenIds


class HostMicroBatch(Protocol):
    """What `data` hands over: numpy arrays, all [T] unless said otherwise."""

    @property
    def token_ids(self) -> np.ndarray: ...
    @property
    def position_ids(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def cu_seqlens(self) -> np.ndarray: ...  # [num_documents + 1]
    @property
    def supervised_positions(self) -> np.ndarray: ...  # [S]
    @property
    def row_ids(self) -> np.ndarray: ...
    @property
    def token_offsets(self) -> np.ndarray: ...


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
    def from_host(batch: HostMicroBatch, device: torch.device | str) -> PackedTokens:
        """Copy a micro-batch to the device."""

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device, non_blocking=True)

        return PackedTokens(
            TokenIds.of(batch.token_ids, device),
            put(batch.position_ids)[None],
            DocumentLayout.of(batch.cu_seqlens, device),
            put(batch.labels),
            put(batch.supervised_positions),
            TokenIds.of(batch.labels[batch.supervised_positions], device),
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
