"""A step far slower than planned is said once, with what it is likely to come from."""

from __future__ import annotations

import platform

import pytest
from simulated_gpu.fixture import SimulatedGpu

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.train.pace import STEPS_LOOKED_AT, Pace
from qlora_train.weights.host_memory import HostMemory

LEFT_OUT = 2


def lines(pace: Pace, seconds: list[float], planned_seconds: float) -> list[tuple[int, str]]:
    """(number of the step from 0, line) of all that is said."""
    said = [(i, pace.slow_line(step, planned_seconds)) for i, step in enumerate(seconds)]
    return [(i, line) for i, line in said if line is not None]


@pytest.mark.parametrize(
    ("seconds", "planned", "is_slow"),
    [
        ([90, 90, *[10] * 20], 3.0, True),
        ([90, 90, *[8.9] * 20], 3.0, False),  # less than three times as long
        ([90, 90, *[1.9] * 20], 0.01, False),  # a short step, mostly queueing
        ([90, 90, *[2.1] * 20], 0.01, True),
        ([90, 90, 50, 50, 3, 3, 3, *[50] * 20], 3.0, False),  # two that were tried again
        ([90, 90, *[50] * (STEPS_LOOKED_AT - 1)], 3.0, False),  # too few to tell
    ],
)
def test_the_median_of_a_few_steps_decides_once(seconds: list[float], planned: float, is_slow: bool) -> None:
    said = lines(Pace(THE_CPU.description, HostMemory(THE_CPU), LEFT_OUT), seconds, planned)
    assert [i for i, _ in said] == ([LEFT_OUT + STEPS_LOOKED_AT - 1] if is_slow else [])


def test_in_words() -> None:
    pace = Pace(THE_CPU.description, HostMemory(THE_CPU), LEFT_OUT)
    ((_, line),) = lines(pace, [12.0] * 20, 3.0)
    assert line == (
        "a step takes 12 s, 4.0 times what was planned (3 s). Likely: other processes on this CPU; memory "
        "that the system swaps out"
    )


@pytest.mark.parametrize(
    ("release", "spills"), [("6.8.0-45-generic", False), ("5.15.153.1-microsoft-standard-WSL2", True)]
)
@pytest.mark.parametrize("is_refused", [False, True])
def test_causes_follow_what_is_known(
    sim: ComputeDevice,
    simulated_gpu: SimulatedGpu,
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    spills: bool,
    is_refused: bool,
) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    if is_refused:
        simulated_gpu.refuse_pinning()
    host = HostMemory(sim)
    buffer = host.empty(2**20)
    ((_, line),) = lines(Pace(sim.description, host, LEFT_OUT), [50.0] * 20, 3.0)
    assert ("system memory" in line) == spills
    assert ("could not be pinned" in line) == is_refused
    assert line.endswith("another process on the device; a device that is hot and has lowered its clocks")
    del buffer
