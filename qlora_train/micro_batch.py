"""A micro-batch on the host, as `data` makes it for the model: a flat row of T tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED_LABEL = -100


@dataclass(frozen=True)
class MicroBatch:
    """Numpy arrays of one micro-batch.

    token_ids, position_ids: int64 [T]. labels: int64 [T], the token to predict at each position, -100 for
    none. cu_seqlens: int32 [documents + 1], boundaries of the documents, the padding at the end included.
    row_ids: int64 [T], the place of the token's bin in the data order (-1: padding). token_offsets: int64
    [T], 0 .. sequence_length - 1 within the bin.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    row_ids: np.ndarray
    token_offsets: np.ndarray

    @property
    def supervised_positions(self) -> np.ndarray:
        """The positions with a label, int64 [S]."""
        return np.flatnonzero(self.labels != IGNORED_LABEL)
