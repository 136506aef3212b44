from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from qlora_train.data.packing import Bins, one_per_bin, pack_best_fit


def listed(bins: Bins) -> list[list[int]]:
    return [bins[index].tolist() for index in range(len(bins))]


def naive_best_fit(lengths: list[int], size: int) -> list[int]:
    """Fill of every bin, by scanning all bins for each document."""
    fill: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, used in enumerate(fill) if used + length <= size]
        if fitting:
            fill[max(fitting, key=lambda i: fill[i])] += length
        else:
            fill.append(length)
    return sorted(fill)


@pytest.mark.parametrize("seed", range(5))
def test_packs_as_the_naive_algorithm_does(seed: int) -> None:
    source = random.Random(seed)
    lengths = [source.randint(1, 50) for _ in range(300)]
    bins = pack_best_fit(np.array(lengths), 50)
    assert sorted(bins.documents.tolist()) == list(range(300))
    fills = bins.sums(np.array(lengths)).tolist()
    assert fills == [sum(lengths[i] for i in each) for each in listed(bins)]
    assert max(fills) <= 50
    assert sorted(fills) == naive_best_fit(lengths, 50)
    assert listed(bins) == listed(pack_best_fit(np.array(lengths), 50))


def test_known_cases() -> None:
    assert listed(pack_best_fit(np.array([3, 5, 2, 5]), 5)) == [[1], [3], [0, 2]]
    assert listed(pack_best_fit(np.array([4, 3, 1, 1]), 5)) == [[0, 2], [1, 3]]
    assert listed(one_per_bin(2)) == [[0], [1]]


def test_a_hundred_thousand_documents() -> None:
    source = random.Random(0)
    lengths = [min(2048, 1 + int(source.expovariate(1 / 300))) for _ in range(100_000)]
    bins = pack_best_fit(np.array(lengths), 2048)
    assert len(bins.documents) == 100_000
    assert sum(lengths) / (2048 * len(bins)) > 0.995
    first_lengths = [lengths[each[0]] for each in listed(bins)]
    assert all(a >= b for a, b in pairwise(first_lengths))
