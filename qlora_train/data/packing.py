"""Best-fit decreasing: documents into bins of sequence_length tokens.

Longest document first, each into the fullest bin that still has room for it, else into a new one. This is
within 11/9 of the fewest bins possible, and for mixed lengths usually over 99 % full; taking documents as
they come (what simple packers do) wastes a few per cent, and cutting them at bin ends would truncate.

Open bins are kept in one stack per number of free tokens, beside a sorted list of the numbers in use (at most
sequence_length of them), so placing n documents takes n binary searches instead of n scans of all bins.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

Bin = list[int]  # indices of documents


def pack_best_fit(lengths: Sequence[int], sequence_length: int) -> list[Bin]:
    """Bins of document indices, each index once, no bin over `sequence_length` tokens. Deterministic."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    bins: list[Bin] = []
    open_bins: dict[int, list[int]] = {}
    free_sizes: list[int] = []
    for index in order.tolist():
        length = lengths[index]
        assert 0 < length <= sequence_length, "documents are cut before they are packed"
        at = bisect_left(free_sizes, length)
        if at == len(free_sizes):
            bins.append([index])
            place, free = len(bins) - 1, sequence_length
        else:
            free = free_sizes[at]
            place = open_bins[free].pop()
            if not open_bins[free]:
                free_sizes.pop(at)
            bins[place].append(index)
        free -= length
        if free:
            stack = open_bins.setdefault(free, [])
            if not stack:
                insort(free_sizes, free)
            stack.append(place)
    return bins


def one_per_bin(lengths: Sequence[int]) -> list[Bin]:
    """`packing: false`: every document has a bin to itself, in order."""
    return [[index] for index in range(len(lengths))]
