"""The loss scale of fp16 training: grows while gradients are finite, shrinks when they overflow."""

from __future__ import annotations

from dataclasses import dataclass


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
        """After a non-finite gradient: halve the scale and return True, or return False where the scale is 1
        and cannot be the cause."""
        self.good_steps = 0
        if self.value <= 1.0:
            return False
        self.value /= 2
        self.num_overflows += 1
        return True

    def record_applied(self) -> None:
        """After an applied step: double the scale if GROWTH_INTERVAL of them came in a row."""
        if not self.dynamic:
            return
        self.good_steps += 1
        if self.good_steps >= self.GROWTH_INTERVAL:
            self.value, self.good_steps = min(self.value * 2, self.MAXIMUM), 0
