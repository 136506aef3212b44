"""How long a run is, its learning rate as a pure function of the step, and the scale of fp16 losses.

A pure function has nothing to save: a resume computes the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_train.recipe import TrainingSection


def learning_rate(step: int, num_steps: int, peak: float, warmup_ratio: float, kind: str) -> float:
    """The learning rate of optimizer step `step` = 1 .. num_steps.

    Warm-up is linear over ceil(warmup_ratio * num_steps) steps, from peak / warm-up steps to peak (never 0: a
    step with rate 0 would be thrown away). Then "constant", or "linear" or "cosine" decay, which would reach
    0 one step after the last.
    """
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step <= num_warmup:
        return peak * step / num_warmup
    progress = (step - num_warmup - 1) / max(1, num_steps - num_warmup)
    if kind == "linear":
        return peak * (1.0 - progress)
    if kind == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    assert kind == "constant", kind
    return peak


def rows_per_step(training: TrainingSection, num_processes: int) -> int:
    """Bins of one optimizer step, all ranks together."""
    return training.micro_batch_size * training.gradient_accumulation_steps * num_processes


def num_rows(training: TrainingSection, num_bins: int, num_processes: int) -> int:
    """Bins of the whole run, all ranks together: full steps, or the epochs to their last bin."""
    if training.max_steps is not None:
        return training.max_steps * rows_per_step(training, num_processes)
    return math.ceil((training.epochs or 1) * num_bins)


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740); constant 1 in bf16 and
    fp32.

    The rule: a step whose gradient overflows while the scale is above 1 is not applied, halves the scale and
    is counted in `num_overflows`; after GROWTH_INTERVAL applied steps in a row the scale doubles, up to
    MAXIMUM. A skipped step's batch counts as seen and the learning rate advances, so a resume replays
    exactly. Powers of two only: scaling is exact.
    """

    value: float = 1.0
    dynamic: bool = False
    good_steps: int = 0
    num_overflows: int = 0

    INITIAL = 2.0**13
    MAXIMUM = 2.0**20
    GROWTH_INTERVAL = 200

    @staticmethod
    def for_dtype(is_float16: bool) -> LossScale:
        return LossScale(LossScale.INITIAL, dynamic=True) if is_float16 else LossScale()

    def absorbs_overflow(self) -> bool:
        """After a non-finite gradient: halve and say True, or say False where scaling cannot be the cause."""
        self.good_steps = 0
        if self.value <= 1.0:
            return False
        self.value /= 2
        self.num_overflows += 1
        return True

    def record_applied(self) -> None:
        """After an applied step: grow when enough of them came in a row."""
        if not self.dynamic:
            return
        self.good_steps += 1
        if self.good_steps >= self.GROWTH_INTERVAL:
            self.value, self.good_steps = min(self.value * 2, self.MAXIMUM), 0
