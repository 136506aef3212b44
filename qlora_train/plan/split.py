"""How the bins of an optimizer step are divided into micro-batches.

The loss is a sum over the whole step, so it does not depend on the division, apart from the order of sums;
memory and time do. With `training.micro_batch_size: auto` the plan chooses one of a few. Where bins do not
divide evenly among processes, the last micro-batches of a step are filled with empty bins, which cost next to
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_train.errors import UserError
from qlora_train.recipe import Recipe, TrainingSection

TOKENS_OF_MICRO_BATCHES = (8_192, 4_096, 2_048, 1_024)
"""Of more, products are no faster; of fewer, each costs more than it computes."""


@dataclass(frozen=True)
class Split:
    """micro_batch_size: bins of one flat row. num_micro_batches: of a step on each rank."""

    micro_batch_size: int
    num_micro_batches: int


def batch_size_of(training: TrainingSection, num_ranks: int) -> int:
    """Bins of one optimizer step on all ranks. Raises `UserError` where the recipe's numbers of micro-batches
    are those of another number of processes."""
    steps, size = training.gradient_accumulation_steps, training.micro_batch_size
    if training.batch_size is None:
        assert steps is not None and isinstance(size, int), "a recipe says one or the other"
        return size * steps * num_ranks
    if steps is not None and isinstance(size, int) and size * steps * num_ranks != training.batch_size:
        raise UserError(
            f"training.batch_size is {training.batch_size}, but micro_batch_size x "
            f"gradient_accumulation_steps x processes is {size} x {steps} x {num_ranks} = "
            f"{size * steps * num_ranks}: write batch_size alone, or numbers that agree"
        )
    return training.batch_size


def stated_micro_batch_size(training: TrainingSection, num_ranks: int) -> int | None:
    """What the recipe says, as a size or a number of micro-batches; None: the plan chooses."""
    if isinstance(training.micro_batch_size, int):
        return training.micro_batch_size
    if training.gradient_accumulation_steps is None:
        return None
    return -(-batch_size_of(training, num_ranks) // (num_ranks * training.gradient_accumulation_steps))


def splits_of(recipe: Recipe, num_ranks: int = 1) -> list[Split]:
    """What a plan may choose from, large micro-batches first: the one that the recipe says, or for a few
    sizes in tokens the largest divisor of a rank's bins that stays below."""
    num_bins = -(-batch_size_of(recipe.training, num_ranks) // num_ranks)
    stated = stated_micro_batch_size(recipe.training, num_ranks)
    divisors = _divisors(num_bins)
    most = [max(1, tokens // recipe.data.sequence_length) for tokens in TOKENS_OF_MICRO_BATCHES]
    sizes = {max(d for d in divisors if d <= size) for size in most} if stated is None else {stated}
    return [Split(size, -(-num_bins // size)) for size in sorted(sizes, reverse=True)]


def smallest_split(recipe: Recipe, num_ranks: int = 1) -> Split | None:
    """One bin at a time, where a plan may choose that."""
    if stated_micro_batch_size(recipe.training, num_ranks) is not None:
        return None
    return Split(1, -(-batch_size_of(recipe.training, num_ranks) // num_ranks))


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
