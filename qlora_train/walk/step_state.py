"""What one optimizer step leaves to the next beside tensors: the loss scale, and counts of skipped steps.

Dynamic loss scaling is for fp16 (Micikevicius et al. 2018, arXiv:1710.03740); in bf16 and fp32 the scale
stays 1. The scale grows while gradients are finite and shrinks when they overflow. Powers of two only:
scaling is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

INITIAL_SCALE, MAX_SCALE = 2.0**13, 2.0**20
GROWTH_INTERVAL = 200
"""Applied steps in a row after which the scale doubles."""


@dataclass
class StepState:
    """The loss scale and the counts of steps that were not applied.

    loss_scale_good_steps: applied steps since the scale changed. num_overflows: steps not applied because of
    the scale. num_skipped: bad steps, whose gradient is not finite at any scale; skipped_in_a_row: those
    since the last applied step. The batch of a step that is not applied counts as seen and the learning rate
    advances, so a resume replays exactly.
    """

    loss_scale: float = 1.0
    loss_scale_good_steps: int = 0
    num_overflows: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0

    def absorbs_overflow(self) -> bool:
        """After a non-finite gradient: halve the scale and return True, or count a bad step and return False
        where the scale is 1 and cannot be the cause."""
        self.loss_scale_good_steps = 0
        if self.loss_scale <= 1.0:
            self.num_skipped += 1
            self.skipped_in_a_row += 1
            return False
        self.loss_scale /= 2
        self.num_overflows += 1
        return True

    def record_applied(self, *, scales_loss: bool) -> None:
        """After an applied step: double the scale if `GROWTH_INTERVAL` of them came in a row.
        scales_loss: the scale is dynamic."""
        self.skipped_in_a_row = 0
        if not scales_loss:
            return
        self.loss_scale_good_steps += 1
        if self.loss_scale_good_steps >= GROWTH_INTERVAL:
            self.loss_scale, self.loss_scale_good_steps = min(self.loss_scale * 2, MAX_SCALE), 0
