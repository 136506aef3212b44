"""Splits off an evaluation share by content: examples that say the same are never on both sides.

Contents are sorted by a hash keyed with the seed and taken from the front until the share is reached. A
content's place therefore depends on nothing but the seed and itself: not on the order of the file, nor on
what else is in it.
"""

from __future__ import annotations

import hashlib

import numpy as np

from qlora_train.errors import DataError


def content_groups(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of examples that say the same. keys: uint8 [R, 32]. Returns (group of each example [R], first
    example of each group [G]); groups are in the order of their keys."""
    words = np.ascontiguousarray(keys).view(">u8")
    order = np.lexsort(words.T[::-1])
    in_order = words[order]
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    groups = np.empty(len(keys), dtype=np.int64)
    groups[order] = np.cumsum(is_new) - 1
    return groups, order[is_new]


def num_also_in(keys: np.ndarray, others: np.ndarray) -> int:
    """How many of the examples with these keys say the same as one of the others."""
    groups, _ = content_groups(np.concatenate([keys, others]))
    return int(np.count_nonzero(np.isin(groups[: len(keys)], groups[len(keys) :])))


def split_by_content(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Mask of the examples for evaluation, bool [R], at most round(share x R). keys: content keys, uint8 [R,
    32].

    Raises DataError where a side would be empty.
    """
    groups, first_examples = content_groups(keys)
    num_examples = np.bincount(groups, minlength=len(first_examples))
    num_wanted = round(share * len(keys))
    is_chosen = np.zeros(len(first_examples), dtype=bool)
    num_chosen = 0
    for group in _order(keys[first_examples], seed).tolist():
        if num_chosen == num_wanted:
            break
        if num_chosen + num_examples[group] <= num_wanted:
            is_chosen[group] = True
            num_chosen += int(num_examples[group])
    if not 0 < num_chosen < len(keys):
        raise DataError(
            f"data.eval: {share} of {len(keys)} rows ({len(first_examples)} different ones) leaves "
            f"{num_chosen} for evaluation and {len(keys) - num_chosen} for training. Use another share, "
            "or more rows."
        )
    return is_chosen[groups]


def chosen_by_weight(keys: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """The number of times that each example is seen in an epoch, int64 [R]: its weight, rounded up for as
    many examples as make the sum right. Which these are depends on their contents and the seed. weights:
    [R]."""
    times = np.floor(weights).astype(np.int64)
    for weight in np.unique(weights[weights != times]):
        examples = np.flatnonzero(weights == weight)
        order = examples[_order(keys[examples], seed)]
        times[order[: round(float(weight % 1) * len(examples))]] += 1
    return times


def _order(keys: np.ndarray, seed: int) -> np.ndarray:
    """The examples of `keys`, sorted by a hash keyed with the seed."""
    prefix = b"%d " % seed
    digests = b"".join(hashlib.sha256(prefix + key.tobytes()).digest() for key in keys)
    return np.lexsort(np.frombuffer(digests, dtype=">u8").reshape(-1, 4).T[::-1])
