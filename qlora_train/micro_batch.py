"""One micro-batch on the host, as `data` makes it and the model takes it: a flat row of T tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED_LABEL = -100


@dataclass(frozen=True)
class MicroBatch:
    """Numpy arrays of one flat row.

    token_ids, position_ids int64 [T]; labels int64 [T], the token to predict at each place, -100 where none
    is; cu_seqlens int32 [documents + 1], the dummy tail included; row_ids int64 [T], the position in the data
    order of the token's bin (-1: a dummy); token_offsets int64 [T], 0 .. sequence_length - 1 within the bin.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    row_ids: np.ndarray
    token_offsets: np.ndarray

    @property
    def supervised_positions(self) -> np.ndarray:
        """int64 [S], the places with a label."""
        return np.flatnonzero(self.labels != IGNORED_LABEL)
