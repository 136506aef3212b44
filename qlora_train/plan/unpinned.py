"""Logs once what it costs that the system refuses to pin host memory, by measuring copies.

Training goes on (weights/host_memory.py). Weights are copied through pinned staging buffers
(weights/stores.py), or, where nothing can be pinned, by the driver through a buffer of its own, at 1/2 to 1/6
of the bus's rate. The plan was made with the rate of pinned memory; the line compares the time model at
the rate measured now. As the number of later refusals is unknown, it assumes all copies: an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from qlora_train.device.compute import ComputeDevice
from qlora_train.plan.generation import GenerationPlan
from qlora_train.plan.measured_rates import fastest_seconds
from qlora_train.plan.plan import Plan
from qlora_train.plan.time_model import stated_rates, step_time
from qlora_train.plan.words import duration
from qlora_train.weights.execution_plan import ExecutionPlan
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.stores import ItemReader

_TIMED_BYTES = 16 * 2**20  # little: the device may be nearly full
_LEAST_LOSS = 0.05


def host_memory_of_run(
    plan: Plan, execution: ExecutionPlan, device: ComputeDevice, log: Callable[[str], None]
) -> HostMemory:
    """Host memory that logs, when pinning is first refused, its cost per training step. execution: the plan
    that the run follows, which in a resume is not `plan`'s own."""

    def step_seconds(copy_rate: float) -> float:
        return step_time(plan.workload, execution, replace(plan.rates, copy=copy_rate)).total_seconds

    cost_line = partial(_cost_line, device, plan.rates.copy, step_seconds, "step")
    return HostMemory(device, refused=lambda host: log(cost_line(host)))


def host_memory_of_generation(
    plan: GenerationPlan, device: ComputeDevice, log: Callable[[str], None]
) -> HostMemory:
    """Host memory that logs, when pinning is first refused, its cost per new token of all prompts. Generation
    is planned without rates, so the stated one is compared with."""
    stated = stated_rates(device.description).copy
    cost_line = partial(_cost_line, device, stated, lambda rate: plan.copied_bytes_per_token / rate, "token")
    return HostMemory(device, refused=lambda host: log(cost_line(host)))


def _cost_line(
    device: ComputeDevice,
    planned_rate: float,
    seconds_at: Callable[[float], float],
    unit: str,
    host: HostMemory,
) -> str:
    """The line to log: pinning was refused, the measured and the planned rate (bytes/s), and the seconds lost
    per `unit` of work, which takes seconds_at(rate)."""
    rate = _rate_of_unpinned(device, host)
    told = (
        f"the system refused to pin memory (ulimit -l: {_locked_limit()}); "
        f"copies run at {rate / 1e9:.1f} GB/s"
    )
    if rate > (1 - _LEAST_LOSS) * planned_rate:
        return f"{told}, with which the plan has reckoned"
    more_seconds = seconds_at(rate) - seconds_at(planned_rate)
    return f"{told} instead of {planned_rate / 1e9:.1f} GB/s: up to {duration(more_seconds)} more per {unit}"


def _rate_of_unpinned(device: ComputeDevice, host: HostMemory) -> float:
    """Measured bytes per second of copying weights from pageable RAM to the device."""
    weights = torch.zeros(_TIMED_BYTES, dtype=torch.uint8)
    there = torch.empty_like(weights, device=device.torch)
    reader = ItemReader(device, host)
    return _TIMED_BYTES / fastest_seconds(device, lambda: reader.copy(weights, there))


def _locked_limit() -> str:
    import resource  # not on Windows

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // 1024} KiB"
