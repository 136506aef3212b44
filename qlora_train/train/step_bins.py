"""Which bins of the data order a step takes, and which of them each rank computes.

Step n (from 1) takes the bins [(n - 1) R, n R), R = `bins_per_step`. Micro-batch k of rank r is the
(k * ranks + r)-th group of `micro_batch_size` of them, and empty where they are used up. Neither R nor the
order depends on the split or on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_train.plan.split import Split


@dataclass(frozen=True)
class StepBins:
    """num_bins: of the whole run. rank: of this process, of `num_ranks`."""

    num_bins: int
    bins_per_step: int
    split: Split
    rank: int
    num_ranks: int

    def positions(self, step: int) -> list[int | None]:
        """The positions in the data order of a step's bins; None past the end of the last epoch."""
        first = (step - 1) * self.bins_per_step
        return [p if p < self.num_bins else None for p in range(first, first + self.bins_per_step)]

    def micro_batches(self, step: int) -> list[list[int | None]]:
        """The positions in each of this rank's micro-batches, of which every rank has as many."""
        positions = self.positions(step)
        num_places = self.split.micro_batch_size * self.split.num_micro_batches * self.num_ranks
        return self.of_this_rank([*positions, *[None] * (num_places - len(positions))])

    def of_this_rank(self, positions: Sequence[int | None]) -> list[list[int | None]]:
        """This rank's micro-batches of any bins; None where the last one has no more."""
        size = self.split.micro_batch_size
        groups = [[*positions[i : i + size], *[None] * size][:size] for i in range(0, len(positions), size)]
        return groups[self.rank :: self.num_ranks]
