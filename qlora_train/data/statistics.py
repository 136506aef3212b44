"""Lengths, duplicates, stop tokens and filling of a data set, in numbers and in the words of `preview`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.dataset import PackedDataset, padded_length
from qlora_train.data.split import content_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BAR_CHARACTERS = 40
_NUM_CLASSES = 10
_LENGTH_STEP = 64  # advised lengths are multiples of it
_SHARE_TO_HOLD = 0.99
_EXAMPLES_LOOKED_AT = 2000  # for stop tokens


@dataclass(frozen=True)
class Lengths:
    """Tokens of each example's longest text before anything was cut, sorted."""

    values: np.ndarray

    @staticmethod
    def of(dataset: PackedDataset) -> Lengths:
        return Lengths(np.sort(dataset.examples.example_lengths[dataset.is_of_example]))

    @property
    def longest(self) -> int:
        return int(self.values[-1])

    def percentile(self, share: float) -> int:
        """The smallest length that at least this share of the examples does not exceed."""
        return int(self.values[max(int(np.ceil(share * len(self.values))) - 1, 0)])

    def share_longer_than(self, length: int) -> float:
        return float(np.mean(self.values > length))

    def line(self) -> str:
        return (
            f"tokens a row: p50 {self.percentile(0.5):,}, p95 {self.percentile(0.95):,}, max {self.longest:,}"
        )

    def histogram(self) -> list[str]:
        """A line per class of lengths: bounds, a bar, examples."""
        shortest = int(self.values[0])
        width = -(-(self.longest - shortest + 1) // _NUM_CLASSES)
        counts = np.bincount((self.values - shortest) // width)
        digits = len(f"{self.longest + width:,}")
        lines = []
        for i, number in enumerate(counts.tolist()):
            first = shortest + i * width
            bar = "█" * round(number * _BAR_CHARACTERS / counts.max()) or ("▏" if number else "")
            bounds = f"{first:>{digits},} to {first + width - 1:>{digits},}"
            lines.append(f"{bounds}  {bar:<{_BAR_CHARACTERS}} {number:,}")
        return lines


def num_duplicates(dataset: PackedDataset) -> int:
    """Examples that say word for word what another example of this side says, but for the first of each."""
    keys = dataset.examples.example_keys[dataset.is_of_example]
    return len(keys) - len(content_groups(keys)[1])


def stop_tokens(dataset: PackedDataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """Which tokens the last answers end with, most frequent first."""
    ends: Counter[int] = Counter()
    for index in range(min(len(dataset.lengths), _EXAMPLES_LOOKED_AT)):
        document = dataset.document(index)
        ends[int(document.token_ids[np.flatnonzero(document.supervised)[-1]])] += 1
    total = sum(ends.values())
    named = [
        f"{tokenizer.convert_ids_to_tokens(token)!r} ({token}) in {number / total:.0%}"
        for token, number in ends.most_common(3)
    ]
    return f"answers end with {', '.join(named)}" + (" ..." if len(ends) > 3 else "")


def packing_line(dataset: PackedDataset) -> str:
    """What packing makes of the documents, or would make."""
    tokens, length, num_documents = int(dataset.lengths.sum()), dataset.sequence_length, len(dataset.lengths)
    alone = tokens / (num_documents * length)
    if dataset.report.packing:
        return (
            f"packing: {num_documents:,} documents in {dataset.num_bins:,} bins, "
            f"{dataset.report.filling:.1%} full; one document a bin would be {num_documents:,} bins, "
            f"{alone:.1%} full"
        )
    computed = int(padded_length(dataset.lengths, length).sum())
    return (
        f"packing is off: a bin holds one document, {alone:.1%} of sequence_length on average; what is empty "
        f"is not computed ({tokens / computed:.1%} of what is computed are tokens of the data)"
    )


def length_advice(dataset: PackedDataset) -> list[str]:
    """What another sequence_length would change."""
    lengths, length = Lengths.of(dataset), dataset.sequence_length
    longer = lengths.share_longer_than(length)
    holds_all = _rounded_up(lengths.longest)
    if longer:
        most = _rounded_up(lengths.percentile(_SHARE_TO_HOLD))
        more = f"{most:,} would hold 99 % of them, " if length < most < holds_all else ""
        return [
            f"advice: {longer:.1%} of the rows are longer than sequence_length {length:,}; {more}"
            f"{holds_all:,} would hold all of them"
        ]
    if holds_all <= length // 2:
        return [
            f"advice: sequence_length {holds_all:,} holds every row and needs {holds_all / length:.0%} of "
            f"the memory for activations (a bin then has fewer tokens: take more bins a step)"
        ]
    return []


def _rounded_up(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP
