"""What it costs where the system refuses to pin host memory: measured, and said once.

Training goes on (host_memory.py). Weights are copied through pinned pieces (stores.py), or, where nothing can
be pinned, by the driver through a buffer of its own: a half to a sixth of the bus's rate. The plan was made
with the rate of pinned pages; the same time model with the rate that is measured now says what the difference
is, if all copies were to run at it. At the first refusal nobody knows how many will be, so that is the most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
    plan: Plan,
    execution: ExecutionPlan,
    device: ComputeDevice,
    log: Callable[[str], None],
) -> HostMemory:
    """Host memory that tells `log` at the first refusal what it costs per step of this run. execution: what
    the run does, which in a resume is not the plan's own."""

    def step_seconds(copy_bytes_per_second: float) -> float:
        rates = replace(plan.rates, copy=copy_bytes_per_second)
        return step_time(plan.workload, execution, rates).total_seconds

    def refused(host: HostMemory) -> None:
        log(refusal_line(device, host, plan.rates.copy, step_seconds, "step"))

    return HostMemory(device, refused=refused)


def host_memory_of_generation(
    plan: GenerationPlan, device: ComputeDevice, log: Callable[[str], None]
) -> HostMemory:
    """The same for generation: what a refusal costs per token of all prompts. Its plan needs no rates, so the
    one to compare with is stated."""
    stated = stated_rates(device.description).copy

    def token_seconds(copy_bytes_per_second: float) -> float:
        return plan.copied_bytes_per_token / copy_bytes_per_second

    def refused(host: HostMemory) -> None:
        log(refusal_line(device, host, stated, token_seconds, "token"))

    return HostMemory(device, refused=refused)


def refusal_line(
    device: ComputeDevice,
    host: HostMemory,
    planned_rate: float,
    seconds_at: Callable[[float], float],
    unit: str,
) -> str:
    """That pinning was refused, the rate measured now against the planned one (bytes/s), and what that costs
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
    """Bytes per second of weights that wait in pageable RAM."""
    weights = torch.zeros(_TIMED_BYTES, dtype=torch.uint8)
    there = torch.empty_like(weights, device=device.torch)
    reader = ItemReader(device, host)
    return _TIMED_BYTES / fastest_seconds(device, lambda: reader.copy(weights, there))


def _locked_limit() -> str:
    import resource  # not on Windows

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // 1024} KiB"
