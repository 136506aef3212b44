"""Plans on the machine that is about to follow them: its free memory, its measured rates."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_train.kernels.liger import liger_on
from qlora_train.memory import meter
from qlora_train.memory.cache_key import cache_root
from qlora_train.memory.measured_rates import rates_of
from qlora_train.memory.plan.byte_walk import GenerateSize
from qlora_train.memory.plan.from_recipe import device_budget, plan_recipe
from qlora_train.memory.plan.generation import GenerationPlan, WeightsChoice, plan_generation
from qlora_train.memory.plan.host_bytes import HostBudget
from qlora_train.memory.plan.model_shape import find_shape
from qlora_train.memory.plan.plan import Plan
from qlora_train.memory.plan.target import CPU, DeviceKind, Target, Varlen, workspace_config
from qlora_train.memory.plan.workload import Workload
from qlora_train.model.varlen_attention import VarlenAttention, varlen_attention
from qlora_train.recipe import Recipe


def plan_here(
    recipe: Recipe, folder: Path, dtype: torch.dtype, device: torch.device, most_documents: int
) -> Plan:
    """The plan of a run. recipe: with the compute dtype resolved to `dtype`. folder: the base's.
    most_documents: in any micro-batch. See `Plan.require_fit`."""
    target = target_of(device)
    return plan_recipe(
        recipe,
        target,
        meter.free_bytes(device),
        shape=find_shape(str(folder)),
        most_documents=most_documents,
        rates=rates_of(device, dtype, cache_root()),
        has_context=target.on_cuda,
        base_folder=folder,
    )


def plan_generation_here(
    workload: Workload,
    size: GenerateSize,
    device: torch.device,
    *,
    vram_bytes: int | None,
    weights: WeightsChoice,
) -> GenerationPlan:
    """The plan of generation. workload: the model, its packing and factors. vram_bytes: the budget; None:
    what is free. weights: `memory.weights`. See `GenerationPlan.require_fit`."""
    kind = kind_of(device)
    budget_bytes = device_budget(kind, meter.free_bytes(device), vram_bytes, has_context=kind == "cuda")
    return plan_generation(workload, size, budget_bytes, HostBudget.of_this_machine(cache_root()), weights)


def kind_of(device: torch.device) -> DeviceKind:
    """What the planner calls it."""
    return "cuda" if device.type == "cuda" else "cpu"


def target_of(device: torch.device) -> Target:
    """What the planner must know of it, asked of the device and of what is installed."""
    if device.type != "cuda":
        return CPU
    properties = torch.cuda.get_device_properties(device)
    return Target(
        kind="cuda",
        capability=(properties.major, properties.minor),
        num_multiprocessors=properties.multi_processor_count,
        varlen=varlen_kind(varlen_attention(device)),
        has_liger=liger_on(device) is not None,
        workspace_config=workspace_config(),
    )


def varlen_kind(varlen: VarlenAttention | None) -> Varlen:
    """What this torch's function for documents of any length can do."""
    if varlen is None or not varlen.can_say("scale", "window_size"):
        return "none"
    return "grouped heads" if varlen.can_say("enable_gqa") else "equal heads"
