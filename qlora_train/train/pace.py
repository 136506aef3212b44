"""Warns once if steps take far longer than planned, with the likely causes.

The plan's seconds follow from rates measured on this machine (plan/time_model.py), so they are not wrong by a
factor of three. Short steps are ignored: the microseconds that the host needs to queue each kernel are not in
the plan.
"""

from __future__ import annotations

import sys
from statistics import median

from qlora_train.device.description import DeviceDescription
from qlora_train.device.system import is_wsl
from qlora_train.plan.words import duration, gib
from qlora_train.weights.host_memory import HostMemory

STEPS_LOOKED_AT = 5
SLOW_FACTOR = 3.0
LEAST_SECONDS_LOST = 2.0


class Pace:
    """Compares the seconds of the first steps with the plan."""

    def __init__(self, device: DeviceDescription, host: HostMemory, num_steps_left_out: int) -> None:
        """host: the run's host memory, which knows how much could not be pinned. num_steps_left_out: first
        steps to ignore, as they load kernels and are metered."""
        self._device, self._host, self._num_left_out = device, host, num_steps_left_out
        self._seconds: list[float] = []

    def slow_line(self, seconds: float, planned_seconds: float) -> str | None:
        """Take the seconds of a step; returns None, or, once, a warning if the median of `STEPS_LOOKED_AT`
        steps is far above the plan."""
        if self._num_left_out > 0:
            self._num_left_out -= 1
            return None
        if len(self._seconds) == STEPS_LOOKED_AT:
            return None
        self._seconds.append(seconds)
        typical = median(self._seconds)
        is_slow = typical > max(SLOW_FACTOR * planned_seconds, planned_seconds + LEAST_SECONDS_LOST)
        if len(self._seconds) < STEPS_LOOKED_AT or not is_slow:
            return None
        return (
            f"a step takes {duration(typical)}, {typical / planned_seconds:.1f} times what was planned "
            f"({duration(planned_seconds)}). Likely: {'; '.join(self._causes())}"
        )

    def _causes(self) -> list[str]:
        if not self._device.is_accelerator:
            return ["other processes on this CPU", "memory that the system swaps out"]
        causes = []
        if self._host.num_unpinned_bytes:
            causes.append(f"copies from {gib(self._host.num_unpinned_bytes)} of RAM that could not be pinned")
        if sys.platform == "win32" or is_wsl():
            causes.append(
                "the driver moves device memory into system memory (Windows, WSL; switch its sysmem fallback "
                "off, or lower memory.vram)"
            )
        return [*causes, "another process on the device", "a device that is hot and has lowered its clocks"]
