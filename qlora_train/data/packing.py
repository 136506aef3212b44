"""Best-fit decreasing: documents into bins of sequence_length tokens.

Longest document first, each into the fullest bin that still has room for it, else into a new one. This is
within 11/9 of the fewest bins possible, and for mixed lengths usually over 99 % full; taking documents as
they come (what simple packers do) wastes a few per cent, and cutting them at bin ends would truncate.

Open bins are kept in one stack per number of free tokens, beside a sorted list of the numbers in use (at most
sequence_length of them), so placing n documents takes n binary searches instead of n scans of all bins.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bins:
    """Documents by bin: bin b holds documents[starts[b] : starts[b + 1]], int64 both."""

    starts: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.documents[self.starts[index] : self.starts[index + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of the documents' values in each bin, int64."""
        return np.add.reduceat(values[self.documents], self.starts[:-1], dtype=np.int64)


def pack_best_fit(lengths: np.ndarray, sequence_length: int) -> Bins:
    """Bins of document indices, each index once, no bin over `sequence_length` tokens. Deterministic."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    bin_of = np.empty(len(order), dtype=np.int64)  # of the documents in this order
    num_bins = 0
    open_bins: dict[int, list[int]] = {}
    free_sizes: list[int] = []
    for place, length in enumerate(np.asarray(lengths)[order].tolist()):
        assert 0 < length <= sequence_length, "documents are cut before they are packed"
        at = bisect_left(free_sizes, length)
        if at == len(free_sizes):
            chosen, free = num_bins, sequence_length
            num_bins += 1
        else:
            free = free_sizes[at]
            chosen = open_bins[free].pop()
            if not open_bins[free]:
                free_sizes.pop(at)
        bin_of[place] = chosen
        free -= length
        if free:
            stack = open_bins.setdefault(free, [])
            if not stack:
                insort(free_sizes, free)
            stack.append(chosen)
    by_bin = np.argsort(bin_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=num_bins))])
    return Bins(starts, order[by_bin])


def one_per_bin(num_documents: int) -> Bins:
    """`packing: false`: every document has a bin to itself, in order."""
    return Bins(np.arange(num_documents + 1), np.arange(num_documents))
