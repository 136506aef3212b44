"""The length of a run, and its learning rate as a pure function of the step.

A pure function has no state to save: a resume computes the same numbers.
"""

from __future__ import annotations

import math


def learning_rate(step: int, num_steps: int, peak: float, warmup_ratio: float, kind: str) -> float:
    """The learning rate of optimizer step `step` = 1 .. num_steps.

    Warm-up is linear over w = ceil(warmup_ratio * num_steps) steps, from peak / w to peak (never 0, as a step
    with rate 0 would be wasted). Then "constant", or "linear" or "cosine" decay, which would reach 0 one step
    after the last.
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
