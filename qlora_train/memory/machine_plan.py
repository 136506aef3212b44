"""Plans on the machine that is about to follow them: its free memory, its measured rates; and the budget they
were made for, enforced.

A driver that moves device memory into system memory instead of refusing it (Windows, WSL) turns a step that
is too large into one that is ten times slower, with nothing said. So torch's allocator is held to the budget
of the plan: beyond it memory runs out, and the step is tried again with less (tighten.py). The context is not
the allocator's, nor is managed memory, so both are taken off before.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.context import context_bytes
from qlora_train.device.description import DeviceDescription
from qlora_train.memory.cache_key import cache_root
from qlora_train.memory.measured_rates import rates_of
from qlora_train.memory.plan.byte_walk import GenerateSize
from qlora_train.memory.plan.from_recipe import device_budget, plan_recipe
from qlora_train.memory.plan.generation import GenerationPlan, WeightsChoice, plan_generation
from qlora_train.memory.plan.host_bytes import HostBudget
from qlora_train.memory.plan.model_shape import find_shape
from qlora_train.memory.plan.plan import Plan
from qlora_train.memory.plan.workload import Workload
from qlora_train.recipe import Recipe


def plan_here(
    recipe: Recipe, folder: Path, dtype: torch.dtype, device: ComputeDevice, most_documents: int
) -> Plan:
    """The plan of a run, with no limit set. recipe: with the compute dtype resolved to `dtype`. folder: the
    base's. most_documents: in any micro-batch. See `Plan.require_fit`."""
    device.limit_allocator(None)  # an earlier run's in this process
    rates, target = rates_of(device, dtype, cache_root()), _with_context(device)
    return plan_recipe(
        recipe,
        target,
        device.free_bytes,
        shape=find_shape(str(folder)),
        most_documents=most_documents,
        rates=rates,
        has_context=device.is_accelerator,
        base_folder=folder,
    )


def plan_generation_here(
    workload: Workload,
    size: GenerateSize,
    device: ComputeDevice,
    *,
    vram_bytes: int | None,
    weights: WeightsChoice,
) -> GenerationPlan:
    """The plan of generation, with no limit set. workload: the model, its packing and factors. vram_bytes:
    the budget; None: what is free. weights: `memory.weights`. See `GenerationPlan.require_fit`."""
    device.limit_allocator(None)
    target = _with_context(device)
    budget_bytes = device_budget(target, device.free_bytes, vram_bytes, has_context=device.is_accelerator)
    return plan_generation(
        replace(workload, target=target),
        size,
        budget_bytes,
        HostBudget.of_this_machine(cache_root()),
        weights,
    )


def _with_context(device: ComputeDevice) -> DeviceDescription:
    """The device's description, its context measured: kernels have run, so that what is free from now on is
    free of them too."""
    description = device.description
    if not device.is_accelerator or description.measured_context_bytes is not None:
        return description
    return replace(description, measured_context_bytes=context_bytes(device))


def enforce_budget(
    device: ComputeDevice, workload: Workload, vram_bytes: int | None, *, managed_bytes: int = 0
) -> None:
    """Hold torch's allocator to the budget, before the base is loaded: to what vram_bytes leaves beside the
    context and managed memory. None: to all that is free now, more than the plan was made for, since some of
    it was left to others. What this process had on the device before (a notebook's tensors) comes on top."""
    if not device.is_accelerator:
        return
    device.release_cached()
    if vram_bytes is None:
        device.limit_allocator(device.reserved_bytes + device.free_bytes)
        return
    workspace_bytes = workload.target.workspace_bytes(deterministic=workload.deterministic)
    there_before = max(0, device.reserved_bytes - workspace_bytes)
    room = vram_bytes - workload.target.context_bytes - managed_bytes
    device.limit_allocator(there_before + room)
