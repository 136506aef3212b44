"""The row that an optimizer step adds to metrics.jsonl."""

from __future__ import annotations

from qlora_train.walk.step import StepOutcome, StepRunner


def metrics_row(
    step: int,
    outcome: StepOutcome,
    rate: float,
    num_tokens: int,
    num_supervised: int,
    seconds: float,
    runner: StepRunner,
) -> dict[str, float | int | bool]:
    """The row of an optimizer step. rate: the learning rate. seconds: of the step."""
    row: dict[str, float | int | bool] = {
        "step": step,
        "loss": outcome.loss,
        "learning_rate": rate,
        "grad_norm": outcome.grad_norm,
        "num_tokens": num_tokens,
        "num_supervised_tokens": num_supervised,
        "tokens_per_second": num_tokens / seconds,
        "applied": outcome.applied,
    }
    if runner.scale.dynamic:
        row |= {"loss_scale": runner.scale.value, "overflowed": outcome.overflowed}
    return row
