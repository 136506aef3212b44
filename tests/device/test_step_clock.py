"""The step clock: every second has one cause, and none is read that the host has not waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu

from qlora_train.device.step_clock import Cause, StepClock
from qlora_train.kernels.on_device import find_device

pytestmark = pytest.mark.filterwarnings("ignore:Triton does not run")


class Hand:
    """A device whose time is set by hand."""

    now = 0.0

    def moment(self) -> float:
        return self.now

    def seconds_between(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def clock(hand: Any) -> StepClock:
    return StepClock(hand)


def test_inner_causes_are_taken_out_of_outer_ones(hand: Hand, clock: StepClock) -> None:
    with clock.step():
        hand.now += 1
        with clock.spent_on(Cause.BACKWARD):
            hand.now += 2
            for seconds in (4, 8):
                with clock.spent_on(Cause.WEIGHTS):
                    hand.now += seconds
                hand.now += 16
        clock.host_has_waited()
    assert clock.read() == {"other_seconds": 1, "backward_seconds": 34, "waiting_for_weights_seconds": 12}
    assert clock.read() == {}


def test_what_is_not_over_comes_with_the_next_reading(hand: Hand, clock: StepClock) -> None:
    for expected in ({"forward_seconds": 1}, {"forward_seconds": 1, "optimizer_seconds": 2}):
        with clock.step():
            with clock.spent_on(Cause.FORWARD):
                hand.now += 1
            with clock.spent_on(Cause.OPTIMIZER):
                clock.host_has_waited()
                hand.now += 2
        hand.now += 100  # between steps
        assert {key: seconds for key, seconds in clock.read().items() if seconds} == expected


def test_between_steps_nothing_is_divided_or_counted_unasked(hand: Hand, clock: StepClock) -> None:
    with clock.spent_on(Cause.WEIGHTS):
        hand.now += 1
    with clock.between_steps(Cause.EVALUATION), clock.spent_on(Cause.WEIGHTS):
        hand.now += 2
    hand.now += 4
    clock.host_has_waited()
    assert clock.read() == {"evaluation_seconds": 2}


def test_a_failure_inside_ends_its_cause(hand: Hand, clock: StepClock) -> None:
    with pytest.raises(KeyboardInterrupt), clock.step(), clock.spent_on(Cause.LOSS):
        hand.now += 1
        raise KeyboardInterrupt
    hand.now += 2
    with clock.step():
        hand.now += 4
    clock.host_has_waited()
    assert clock.cause is None and clock.read() == {"loss_seconds": 1, "other_seconds": 4}


def test_on_a_gpu_moments_are_read_after_the_host_has_waited(simulated_gpu: SimulatedGpu) -> None:
    clock, x = find_device().clock, torch.zeros(3, device="sim")
    simulated_gpu.host_reads.clear()
    with clock.step(), clock.spent_on(Cause.FORWARD):
        x.add_(1)
    clock.host_has_waited()  # a lie
    with pytest.raises(RuntimeError, match="not ready"):
        clock.read()
    reads = simulated_gpu.host_reads
    assert not reads.values and not reads.synchronizations
    x.tolist()
    assert set(clock.read()) == {"other_seconds", "forward_seconds"}


def test_a_cpu_has_a_clock_of_its_own_for_each_run() -> None:
    first, second = (find_device(torch.device("cpu")) for _ in range(2))
    assert first.clock is first.clock and first.clock is not second.clock
