"""Splits off an evaluation share by content: rows that say the same are never on both sides.

Contents are sorted by a hash keyed with the seed and taken from the front until the share is reached. A
content's place therefore depends on nothing but the seed and itself: not on the order of the file, nor on
what else is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from qlora_train.data.formats import Example, content_key
from qlora_train.errors import DataError


def split_by_content(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(train, eval), both in the given order; eval has at most round(share x rows) rows.

    Raises DataError where a side would be empty.
    """
    keys = [content_key(example.content) for example in examples]
    num_rows: dict[bytes, int] = {}
    for key in keys:
        num_rows[key] = num_rows.get(key, 0) + 1
    num_wanted = round(share * len(examples))
    chosen: set[bytes] = set()
    num_chosen = 0
    for key in sorted(num_rows, key=lambda key: hashlib.sha256(b"%d " % seed + key).digest()):
        if num_chosen + num_rows[key] <= num_wanted:
            chosen.add(key)
            num_chosen += num_rows[key]
    if not 0 < num_chosen < len(examples):
        raise DataError(
            f"data.eval: {share} of {len(examples)} rows ({len(num_rows)} different ones) leaves "
            f"{num_chosen} for evaluation and {len(examples) - num_chosen} for training. Use another share, "
            "or more rows."
        )
    train = [example for example, key in zip(examples, keys, strict=True) if key not in chosen]
    evaluation = [example for example, key in zip(examples, keys, strict=True) if key in chosen]
    return train, evaluation
