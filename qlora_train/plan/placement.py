"""Places weights on the device, in RAM or on disk, for training and generation.

Streamed layers are spread evenly between resident ones, so that copies overlap with arithmetic. One more
streamed layer always frees device memory, so the fewest that must stream are found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qlora_train.plan.host_budget import HostBudget
from qlora_train.plan.host_bytes import host_bytes
from qlora_train.plan.workload import Workload
from qlora_train.weights.execution_plan import ExecutionPlan, Placement


def placed(
    plan: ExecutionPlan, num_streamed: int, *, place: Placement, is_tied: bool, with_head: bool = True
) -> ExecutionPlan:
    """The plan with num_streamed layers, the embedding and, if asked for, the head in `place`, the rest
    resident. is_tied: embedding and head are one matrix."""
    num_layers, num_resident = plan.num_layers, plan.num_layers - num_streamed
    resident = {(2 * j + 1) * num_layers // (2 * num_resident) for j in range(num_resident)}
    return replace(
        plan,
        weights=tuple(Placement.DEVICE if i in resident else place for i in range(num_layers)),
        embedding=place if with_head or not is_tied else Placement.DEVICE,
        head=place if with_head else Placement.DEVICE,
        num_slots=2 if num_streamed or with_head else 0,
    )


def place_of_streamed(workload: Workload, start: ExecutionPlan, budget: HostBudget) -> Placement:
    """RAM if all weights fit there beside what `start` has there, else disk; on a CPU, whose memory is RAM
    already, always disk."""
    if not workload.on_accelerator:
        return Placement.DISK
    is_tied = workload.shape.is_tied
    everything = placed(start, start.num_layers, place=Placement.RAM, is_tied=is_tied)
    needed = sum(host_bytes(workload, everything, budget.machine).values())
    return Placement.RAM if needed <= budget.ram_bytes else Placement.DISK


def mlp_tiles(num_tokens: int, smallest: int) -> list[int | None]:
    """Tokens per MLP tile to try: None (no tiles), then a half, a quarter, ... of num_tokens."""
    tiles: list[int | None] = [None]
    while (num_tokens := num_tokens // 2) >= smallest:
        tiles.append(num_tokens)
    return tiles


def fewest(
    plan_of: Callable[[int], ExecutionPlan], most: int, fits: Callable[[ExecutionPlan], bool]
) -> ExecutionPlan | None:
    """plan_of(n) for the smallest n up to `most` that fits; None where plan_of(most) does not."""
    if not fits(plan_of(most)):
        return None
    least = 0
    while least < most:
        middle = (least + most) // 2
        if fits(plan_of(middle)):
            most = middle
        else:
            least = middle + 1
    return plan_of(most)
