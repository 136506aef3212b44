"""The budget is enforced: torch's allocator fails beyond what it leaves beside context and managed memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.description import planned_gpu
from qlora_train.plan.fixed_bytes import managed_bytes, optimizer_state_bytes
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.machine_plan import enforce_budget
from qlora_train.plan.plan import (
    FRAGMENTATION,
    FRAGMENTATION_OF_FIXED_SEGMENTS,
    budget_for,
    room_in,
)
from qlora_train.plan.workload import Workload
from qlora_train.recipe import Recipe

MIB, GIB = 2**20, 2**30


def workload_on(device: ComputeDevice, **changes: object) -> Workload:
    values = {"model": {"base": "meta-llama/Llama-3.2-1B"}, "data": {"train": "x"}}
    recipe = Recipe.from_dict(values | {"training": {"micro_batch_size": 4}})
    return replace(plan_recipe(recipe, device.description, 8 * GIB).workload, **changes)


def room_bytes(device: ComputeDevice) -> int:
    """What the allocator gives, in tensors of 2 MiB."""
    held = []
    while True:
        try:
            held.append(torch.empty(2 * MIB, dtype=torch.uint8, device=device.torch))
        except torch.OutOfMemoryError:
            return len(held) * 2 * MIB


@pytest.fixture
def measured(sim: ComputeDevice) -> ComputeDevice:
    return ComputeDevice(replace(sim.description, measured_context_bytes=100 * MIB))


@pytest.mark.parametrize("managed", [0, 60 * MIB])
def test_beyond_the_budget_memory_runs_out(measured: ComputeDevice, managed: int) -> None:
    enforce_budget(measured, workload_on(measured), 500 * MIB, managed_bytes=managed)
    assert 400 * MIB - managed - 20 * MIB <= room_bytes(measured) <= 400 * MIB - managed
    measured.limit_allocator(None)
    assert torch.empty(GIB, dtype=torch.uint8, device=measured.torch).numel() == GIB


def test_what_was_there_before_comes_on_top(measured: ComputeDevice) -> None:
    """A notebook's own tensors, and the cuBLAS workspaces, which the budget holds."""
    workload = workload_on(measured)
    mine = torch.empty(600 * MIB, dtype=torch.uint8, device=measured.torch)
    enforce_budget(measured, workload, 500 * MIB)
    workspaces = workload.target.workspace_bytes(deterministic=False)
    assert 400 * MIB - workspaces - 20 * MIB <= room_bytes(measured) <= 400 * MIB - workspaces
    assert len(mine) == 600 * MIB


def test_without_a_budget_it_is_what_is_free(simulated_gpu: SimulatedGpu, measured: ComputeDevice) -> None:
    """A driver that gives more than there is, from system memory, is not asked for it."""
    mine = torch.empty(600 * MIB, dtype=torch.uint8, device=measured.torch)
    simulated_gpu.limit_memory(2 * GIB)  # the rest is somebody else's
    enforce_budget(measured, workload_on(measured), None)
    simulated_gpu.limit_memory(None)  # and this driver would move it away
    assert 2 * GIB - 620 * MIB <= room_bytes(measured) <= 2 * GIB - 600 * MIB
    assert len(mine) == 600 * MIB


def test_on_the_cpu_nothing_is_limited() -> None:
    enforce_budget(THE_CPU, workload_on(THE_CPU), 1)
    THE_CPU.limit_allocator(None)
    assert torch.zeros(MIB).numel() == MIB


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw"])
@pytest.mark.parametrize("has_access", [True, False])
def test_managed_bytes_are_the_paged_state(optimizer: str, has_access: bool) -> None:
    gpu = replace(planned_gpu(None, None), has_concurrent_managed_access=has_access)
    workload = workload_on(ComputeDevice(replace(gpu, index=0)), optimizer=optimizer)
    is_paged = has_access and optimizer.startswith("paged")
    assert managed_bytes(workload) == (optimizer_state_bytes(workload) if is_paged else 0)
    assert managed_bytes(replace(workload, target=THE_CPU.description)) == 0


@pytest.mark.parametrize(
    ("expands", "share"), [(True, FRAGMENTATION), (False, FRAGMENTATION_OF_FIXED_SEGMENTS)]
)
def test_segments_that_cannot_grow_take_more_of_the_budget(expands: bool, share: float) -> None:
    gpu = replace(planned_gpu("NVIDIA GeForce RTX 4090", (8, 9)), has_expandable_segments=expands)
    workload = workload_on(ComputeDevice(replace(gpu, index=0)))
    beside = gpu.context_bytes + gpu.workspace_bytes(deterministic=False)
    assert room_in(8 * GIB, workload) == int((8 * GIB - beside) * (1 - share))
    assert room_in(budget_for(5 * GIB, workload), workload) >= 5 * GIB


def test_a_measured_context_makes_room() -> None:
    gpu = replace(planned_gpu("NVIDIA GeForce RTX 4090", (8, 9)), measured_context_bytes=200 * MIB)
    stated = replace(gpu, measured_context_bytes=None)
    rooms = [room_in(4 * GIB, workload_on(ComputeDevice(replace(d, index=0)))) for d in (gpu, stated)]
    assert rooms[0] - rooms[1] == pytest.approx(250 * MIB * (1 - FRAGMENTATION), abs=2)
