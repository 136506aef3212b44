"""The learning rate by its formula, and the rule of the fp16 loss scale."""

from __future__ import annotations

import math

import pytest

from qlora_train.train.schedule import learning_rate
from qlora_train.walk.step_state import GROWTH_INTERVAL, MAX_SCALE, StepState

PEAK = 3e-4


def rates(num_steps: int, warmup_ratio: float, kind: str) -> list[float]:
    return [learning_rate(step, num_steps, PEAK, warmup_ratio, kind) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warmup_is_a_straight_line_that_starts_above_zero_and_ends_at_the_peak(kind: str) -> None:
    assert rates(40, 0.1, kind)[:4] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK], rel=1e-12)
    assert rates(40, 0.08, kind)[:4] == rates(40, 0.1, kind)[:4]  # 3.2 steps are 4
    assert rates(40, 0.1, kind)[4] == pytest.approx(PEAK, rel=1e-12)  # decay counts from the step after


def test_linear_decay() -> None:
    assert rates(5, 0.0, "linear") == pytest.approx(
        [PEAK * share for share in (1, 0.8, 0.6, 0.4, 0.2)], rel=1e-12
    )
    assert rates(10, 0.2, "linear")[-1] == pytest.approx(PEAK / 8, rel=1e-12)  # 8 steps of decay: 1/8 is left


def test_cosine_decay() -> None:
    angles = [0, 1 / 4, 2 / 4, 3 / 4]
    expected = [PEAK * (1 + math.cos(math.pi * angle)) / 2 for angle in angles]
    assert rates(4, 0.0, "cosine") == pytest.approx(expected, rel=1e-12)
    assert rates(6, 1 / 3, "cosine")[2:] == pytest.approx(expected, rel=1e-12)


def test_constant_stays_at_the_peak() -> None:
    assert rates(7, 0.0, "constant") == [PEAK] * 7


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("num_steps", "warmup_ratio"), [(1, 0.0), (1, 1.0), (3, 1.0), (20, 0.03)])
def test_no_step_is_thrown_away(kind: str, num_steps: int, warmup_ratio: float) -> None:
    assert all(0 < rate <= PEAK for rate in rates(num_steps, warmup_ratio, kind))


def test_an_overflow_halves_the_scale_and_is_counted() -> None:
    state = StepState(4.0, loss_scale_good_steps=7)
    assert state.absorbs_overflow() and state.absorbs_overflow()
    assert state == StepState(1.0, num_overflows=2)
    assert not state.absorbs_overflow()  # at 1 scaling cannot be the cause
    assert state == StepState(1.0, num_overflows=2, num_skipped=1, skipped_in_a_row=1)


def test_the_scale_doubles_after_enough_applied_steps_in_a_row() -> None:
    state = StepState(8.0)
    for _ in range(GROWTH_INTERVAL - 1):
        state.record_applied(scales_loss=True)
    assert state.absorbs_overflow()  # the row is broken
    for _ in range(GROWTH_INTERVAL - 1):
        state.record_applied(scales_loss=True)
    assert state.loss_scale == 4.0
    state.record_applied(scales_loss=True)
    assert (state.loss_scale, state.loss_scale_good_steps) == (8.0, 0)


def test_the_scale_has_a_ceiling() -> None:
    state = StepState(MAX_SCALE, loss_scale_good_steps=GROWTH_INTERVAL - 1)
    state.record_applied(scales_loss=True)
    assert state.loss_scale == MAX_SCALE


def test_only_float16_is_scaled() -> None:
    fixed = StepState()
    for _ in range(2 * GROWTH_INTERVAL):
        fixed.record_applied(scales_loss=False)
    assert fixed == StepState() and not fixed.absorbs_overflow()
