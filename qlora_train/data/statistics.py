"""Lengths, duplicates, stop tokens and filling of a data set, in numbers and in the words of `preview`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.dataset import PackedDataset, padded_length
from qlora_train.data.split import content_groups
from qlora_train.units import ceil_div, round_up

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import TrainingSection

_BAR_CHARACTERS = 40
_NUM_CLASSES = 10
_LENGTH_STEP = 64  # advised lengths are multiples of it
_SHARE_TO_HOLD = 0.99
_FEW_STEPS, _STEPS_TO_LEARN = 20, 50
_EXAMPLES_LOOKED_AT = 2000  # for stop tokens


def lengths_of(dataset: PackedDataset) -> np.ndarray:
    """Tokens of each example's longest text before anything was cut, sorted."""
    return np.sort(dataset.examples.example_lengths[dataset.is_of_example])


def percentile(lengths: np.ndarray, share: float) -> int:
    """The smallest of the sorted lengths that at least this share of them does not exceed."""
    return int(lengths[max(int(np.ceil(share * len(lengths))) - 1, 0)])


def length_line(lengths: np.ndarray) -> str:
    """A line about sorted lengths: percentiles."""
    middle, most = percentile(lengths, 0.5), percentile(lengths, 0.95)
    return f"tokens a row: p50 {middle:,}, p95 {most:,}, max {int(lengths[-1]):,}"


def length_lines(lengths: np.ndarray) -> list[str]:
    """Lines about sorted lengths: percentiles, and a bar per class with its bounds and examples."""
    shortest, longest = int(lengths[0]), int(lengths[-1])
    width = ceil_div(longest - shortest + 1, _NUM_CLASSES)
    counts = np.bincount((lengths - shortest) // width)
    digits = len(f"{longest + width:,}")
    lines = [length_line(lengths)]
    for i, number in enumerate(counts.tolist()):
        first = shortest + i * width
        bar = "█" * round(number * _BAR_CHARACTERS / counts.max()) or ("▏" if number else "")
        bounds = f"{first:>{digits},} to {first + width - 1:>{digits},}"
        lines.append(f"  {bounds}  {bar:<{_BAR_CHARACTERS}} {number:,}")
    return lines


def num_duplicates(dataset: PackedDataset) -> int:
    """Examples that say word for word what another example of this side says, but for the first of each."""
    keys = dataset.examples.example_keys[dataset.is_of_example]
    return len(keys) - len(content_groups(keys)[1])


def stop_tokens(dataset: PackedDataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """A line about the tokens that the last answers end with, most frequent first."""
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
    """A line about what packing makes of the documents, or would make."""
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


def length_that_holds_all(dataset: PackedDataset) -> int:
    """The sequence length at which nothing is cut."""
    return round_up(int(lengths_of(dataset)[-1]), _LENGTH_STEP)


def length_advice(dataset: PackedDataset) -> list[str]:
    """Lines about what another sequence_length would change."""
    lengths, length = lengths_of(dataset), dataset.sequence_length
    longer = float(np.mean(lengths > length))
    holds_all = length_that_holds_all(dataset)
    if longer:
        most = round_up(percentile(lengths, _SHARE_TO_HOLD), _LENGTH_STEP)
        more = f"{most:,} would hold 99 % of them, " if length < most < holds_all else ""
        return [
            f"advice: {longer:.1%} of the rows are longer than sequence_length {length:,}; {more}"
            f"{holds_all:,} would hold all of them"
        ]
    if holds_all <= length // 2:
        return [
            f"advice: sequence_length {holds_all:,} holds every row and needs {holds_all / length:.0%} of "
            f"the memory for activations (a bin then has fewer tokens)"
        ]
    return []


def steps_line(dataset: PackedDataset, training: TrainingSection) -> str:
    """A line about the optimizer steps of a run."""
    num_steps = training.num_steps(dataset.num_bins)
    num_bins = min(training.bins_per_step(), training.num_bins(dataset.num_bins))
    documents = num_bins * len(dataset.lengths) / dataset.num_bins
    return (
        f"{num_steps:,} optimizer step{'s' if num_steps > 1 else ''} of {num_bins:,} "
        f"bin{'s' if num_bins > 1 else ''}, about {documents:,.0f} documents each"
        + (" (in one process)" if training.batch_size is None else "")
    )


def batch_to_learn(num_bins: int) -> int:
    """The most bins of a step that make `_STEPS_TO_LEARN` steps of a run's bins; one where they are few."""
    return max(1, num_bins // _STEPS_TO_LEARN)


def steps_advice(dataset: PackedDataset, training: TrainingSection) -> list[str]:
    """A line where the epochs end after few optimizer steps, as small data in large bins do."""
    num_steps, num_bins = training.num_steps(dataset.num_bins), training.num_bins(dataset.num_bins)
    smaller = batch_to_learn(num_bins)
    is_divided = training.micro_batch_size != "auto" or training.gradient_accumulation_steps is not None
    if training.max_steps is not None or num_steps >= _FEW_STEPS or smaller >= training.bins_per_step():
        return []
    remedy = (
        "fewer bins a step make more of them"
        if is_divided
        else f"training.batch_size={smaller} makes {ceil_div(num_bins, smaller):,} of them"
    )
    are = "step is" if num_steps == 1 else "steps are"
    return [f"advice: {num_steps:,} optimizer {are} few to learn from: {remedy}"]
