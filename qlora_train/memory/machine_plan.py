"""Plans on the machines that are about to follow them: their free memory, their measured rates.

All ranks of a run follow one plan, for they walk the same layers in the same groups and sum their gradients.
So each says what it has, and all plan for the least of everything: the smallest device, the machine with the
least RAM for the most ranks, the slowest copies.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.description import DeviceDescription, least_capable
from qlora_train.errors import UserError
from qlora_train.memory.cache_key import cache_root
from qlora_train.memory.measured_rates import rates_of
from qlora_train.memory.plan.byte_walk import GenerateSize
from qlora_train.memory.plan.from_recipe import device_budget, free_host_memory, plan_recipe
from qlora_train.memory.plan.generation import GenerationPlan, WeightsChoice, plan_generation
from qlora_train.memory.plan.host_bytes import HostBudget, Machine
from qlora_train.memory.plan.model_shape import find_shape
from qlora_train.memory.plan.plan import Plan
from qlora_train.memory.plan.time_model import Rates
from qlora_train.memory.plan.workload import Workload
from qlora_train.memory.ranks import ALONE, Ranks
from qlora_train.recipe import Recipe


def device_of_all(device: ComputeDevice, ranks: Ranks) -> DeviceDescription:
    """What the devices of all ranks can do: this rank's own where they are alike. Raises `UserError` where
    some are GPUs and others are not."""
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
    most_documents: int,
    ranks: Ranks = ALONE,
    target: DeviceDescription | None = None,
) -> Plan:
    """The plan of a run, the same on all its ranks. recipe: with the compute dtype resolved to `dtype`.
    folder: the base's. most_documents: in any micro-batch. target: `device_of_all`; None: this one. See
    `Plan.require_fit`."""
    target = target or device.description
    num_ranks = len(ranks.here)
    machine = Machine(num_ranks, 1 if ranks.shares_memory else num_ranks)
    host = free_host_memory(recipe, target, folder, machine)
    free_bytes = device.free_bytes if device.is_accelerator else device.free_bytes // num_ranks
    ranks.wait()  # measured while the others measure: they copy at the same time in training too
    rates = rates_of(device, dtype, cache_root(), num_ranks)
    told = ranks.gather({"free_bytes": free_bytes, "host": asdict(host), "rates": asdict(rates)})
    return plan_recipe(
        recipe,
        target,
        min(of["free_bytes"] for of in told),
        shape=find_shape(str(folder)),
        most_documents=most_documents,
        rates=_slowest([of["rates"] for of in told]),
        has_context=device.is_accelerator,
        base_folder=folder,
        host_budget=_smallest([of["host"] for of in told]),
    )


def _smallest(budgets: list[dict[str, Any]]) -> HostBudget:
    """As if the least of each were all on one machine."""
    machines = [budget["machine"] for budget in budgets]
    return HostBudget(
        ram_bytes=min(budget["ram_bytes"] for budget in budgets),
        disk_bytes=min(budget["disk_bytes"] for budget in budgets),
        has_packed_base=all(budget["has_packed_base"] for budget in budgets),
        machine=Machine(
            max(machine["num_ranks"] for machine in machines),
            max(machine["num_copies"] for machine in machines),
        ),
    )


def _slowest(rates: list[dict[str, Any]]) -> Rates:
    """Each rate of the rank where it is the lowest."""
    least = {name: min(of[name] for of in rates) for name in ("flops", "memory", "copy", "disk")}
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
    """The plan of generation. workload: the model, its packing and factors. vram_bytes: the budget; None:
    what is free. weights: `memory.weights`. See `GenerationPlan.require_fit`."""
    budget_bytes = device_budget(
        device.description, device.free_bytes, vram_bytes, has_context=device.is_accelerator
    )
    return plan_generation(workload, size, budget_bytes, HostBudget.of_this_machine(cache_root()), weights)
