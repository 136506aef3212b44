"""Plans a run on its own machine, from its free memory and measured rates, and enforces the budget.

All ranks of a run follow one plan, as they walk the same layers in the same groups and sum their gradients.
They gather their resources and plan for the least of each: the smallest device, the largest context, the
machine with the least RAM for the most ranks, the slowest copies.

Some drivers (Windows, WSL) move device memory into system memory instead of refusing an allocation, which
silently makes a step ten times slower. So torch's allocator is limited to the budget of the plan: beyond it
memory runs out, and the step is tried again with less (walk/oom_fallback.py). The CUDA context and managed
memory are outside the allocator and are subtracted before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.context import context_bytes
from qlora_train.device.description import DeviceDescription, least_capable
from qlora_train.errors import UserError
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.generation import GenerationPlan, WeightsChoice, plan_generation
from qlora_train.plan.host_budget import HostBudget, Machine, device_budget, free_host_memory
from qlora_train.plan.measured_rates import rates_of
from qlora_train.plan.model_shape import find_shape
from qlora_train.plan.plan import Plan
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.plan.split import Split
from qlora_train.plan.time_model import Rates
from qlora_train.plan.workload import Workload
from qlora_train.recipe import Recipe
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.ranks import ALONE, Ranks


def device_of_all(device: ComputeDevice, ranks: Ranks) -> DeviceDescription:
    """The description of the least capable device among all ranks, with this rank's index. Raises `UserError`
    where some are GPUs and others are not."""
    told = [DeviceDescription.from_dict(values) for values in ranks.gather(asdict(device.description))]
    kinds = sorted({description.type for description in told})
    if len(kinds) > 1:
        raise UserError(
            f"the processes of this run compute on devices of different kinds ({', '.join(kinds)}): start no "
            "more of them on a machine than it has GPUs"
        )
    return replace(least_capable(told), index=device.description.index)


def plan_here(
    recipe: Recipe,
    folder: Path,
    dtype: torch.dtype,
    device: ComputeDevice,
    most_documents: Callable[[int], int],
    ranks: Ranks = ALONE,
    target: DeviceDescription | None = None,
    *,
    split: Split | None = None,
    keeps_quantized_base: bool = True,
) -> Plan:
    """The plan of a run, the same on all its ranks; sets no limit on the allocator.

    recipe: with the compute dtype resolved to `dtype`. folder: the base's. most_documents: the largest number
    of documents in any micro-batch of so many bins. target: from `device_of_all`; None: this device. split:
    of the step; None: the best one. keeps_quantized_base: in the cache, for later starts. See
    `Plan.require_fit`."""
    target = target or device.description
    num_ranks = len(ranks.here)
    machine = Machine(num_ranks, 1 if ranks.shares_memory else num_ranks)
    host = replace(
        free_host_memory(recipe, target, folder, machine), keeps_quantized_base=keeps_quantized_base
    )
    device.limit_allocator(None)  # an earlier run's in this process
    context = _context_bytes(device)
    free_bytes = device.free_bytes if device.is_accelerator else device.free_bytes // num_ranks
    ranks.wait()  # measured while the others measure: they copy at the same time in training too
    rates = rates_of(device, dtype, cache_root(), num_ranks)
    told = ranks.gather(
        {"free_bytes": free_bytes, "context": context, "host": asdict(host), "rates": asdict(rates)}
    )
    return plan_recipe(
        recipe,
        replace(
            target, measured_context_bytes=None if context is None else max(of["context"] for of in told)
        ),
        min(of["free_bytes"] for of in told),
        shape=find_shape(str(folder)),
        most_documents=most_documents,
        rates=_slowest([of["rates"] for of in told]),
        has_context=device.is_accelerator,
        base_folder=folder,
        host_budget=_smallest([of["host"] for of in told]),
        num_ranks=ranks.number,
        split=split,
    )


def _smallest(budgets: list[dict[str, Any]]) -> HostBudget:
    """The budget of a machine that has the least RAM and disk of all, for the most ranks and copies."""
    machines = [budget["machine"] for budget in budgets]
    return HostBudget(
        ram_bytes=min(budget["ram_bytes"] for budget in budgets),
        disk_bytes=min(budget["disk_bytes"] for budget in budgets),
        has_quantized_base=all(budget["has_quantized_base"] for budget in budgets),
        keeps_quantized_base=budgets[0]["keeps_quantized_base"],
        machine=Machine(
            max(machine["num_ranks"] for machine in machines),
            max(machine["num_copies"] for machine in machines),
        ),
    )


def _slowest(rates: list[dict[str, Any]]) -> Rates:
    """The lowest of all ranks for each rate."""
    least = {name: min(of[name] for of in rates) for name in rates[0] if name != "source"}
    several = f", the slowest of {len(rates)} ranks" if len(rates) > 1 else ""
    return Rates(**least, source=rates[0]["source"] + several)


def plan_generation_here(
    workload: Workload,
    size: GenerateSize,
    device: ComputeDevice,
    *,
    vram_bytes: int | None,
    weights: WeightsChoice,
) -> GenerationPlan:
    """The plan of generation on this device; sets no limit on the allocator. workload: the model, its
    quantization and LoRA parameters. vram_bytes: the budget; None: what is free. weights: `memory.weights`.
    See `GenerationPlan.require_fit`."""
    device.limit_allocator(None)
    target = replace(device.description, measured_context_bytes=_context_bytes(device))
    budget_bytes = device_budget(target, device.free_bytes, vram_bytes, has_context=device.is_accelerator)
    return plan_generation(
        replace(workload, target=target),
        size,
        budget_bytes,
        HostBudget.of_this_machine(cache_root()),
        weights,
    )


def _context_bytes(device: ComputeDevice) -> int | None:
    """Bytes of this process's CUDA context, measured unless the device's description has them; None on a CPU.
    Measuring runs kernels, so memory that is free afterwards is free with them loaded."""
    told = device.description.measured_context_bytes
    return context_bytes(device) if told is None and device.is_accelerator else told


def enforce_budget(
    device: ComputeDevice, workload: Workload, vram_bytes: int | None, *, managed_bytes: int = 0
) -> None:
    """Limit torch's allocator, before the base is loaded, to vram_bytes less the context and managed memory.

    vram_bytes None: to all that is free now, which is more than the plan uses. Tensors that this process had
    on the device before (a notebook's) come on top."""
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
