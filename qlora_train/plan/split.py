"""Splits the bins of an optimizer step into micro-batches.

The loss is a sum over the whole step, so the split changes only the order of sums, and memory and time. With
`training.micro_batch_size: auto` the plan chooses among a few splits. Where bins do not divide evenly among
processes, the last micro-batches of a step are filled with empty bins, which cost next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_train.errors import UserError
from qlora_train.recipe import Recipe, TrainingSection
from qlora_train.units import ceil_div

TOKENS_OF_MICRO_BATCHES = (8_192, 4_096, 2_048, 1_024)
"""Tokens per micro-batch to try. Larger ones compute no faster; in smaller ones overheads dominate."""


@dataclass(frozen=True)
class Split:
    """The split of a step. micro_batch_size: bins in a micro-batch. num_micro_batches: per step and rank."""

    micro_batch_size: int
    num_micro_batches: int


def batch_size_of(training: TrainingSection, num_ranks: int) -> int:
    """Bins of one optimizer step on all ranks. Raises `UserError` where the recipe's numbers contradict each
    other for this number of processes."""
    steps, size = training.gradient_accumulation_steps, training.micro_batch_size
    found = training.bins_per_step(num_ranks)
    if steps is not None and isinstance(size, int) and size * steps * num_ranks != found:
        raise UserError(
            f"training.batch_size is {training.batch_size}, but micro_batch_size x "
            f"gradient_accumulation_steps x processes is {size} x {steps} x {num_ranks} = "
            f"{size * steps * num_ranks}: write batch_size alone, or numbers that agree"
        )
    return found


def stated_micro_batch_size(training: TrainingSection, num_ranks: int) -> int | None:
    """The micro-batch size that the recipe gives, directly or by the number of micro-batches; None: the plan
    chooses."""
    if isinstance(training.micro_batch_size, int):
        return training.micro_batch_size
    if training.gradient_accumulation_steps is None:
        return None
    return ceil_div(batch_size_of(training, num_ranks), num_ranks * training.gradient_accumulation_steps)


def splits_of(recipe: Recipe, num_ranks: int = 1) -> list[Split]:
    """The splits that a plan may choose from, large micro-batches first: the recipe's, or for each of
    `TOKENS_OF_MICRO_BATCHES` the largest divisor of a rank's bins that does not exceed it."""
    num_bins = ceil_div(batch_size_of(recipe.training, num_ranks), num_ranks)
    stated = stated_micro_batch_size(recipe.training, num_ranks)
    divisors = _divisors(num_bins)
    most = [max(1, tokens // recipe.data.sequence_length) for tokens in TOKENS_OF_MICRO_BATCHES]
    sizes = {max(d for d in divisors if d <= size) for size in most} if stated is None else {stated}
    return [Split(size, ceil_div(num_bins, size)) for size in sorted(sizes, reverse=True)]


def smallest_split(recipe: Recipe, num_ranks: int = 1) -> Split | None:
    """The split into micro-batches of one bin; None where the recipe gives the size."""
    if stated_micro_batch_size(recipe.training, num_ranks) is not None:
        return None
    return Split(1, ceil_div(batch_size_of(recipe.training, num_ranks), num_ranks))


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
