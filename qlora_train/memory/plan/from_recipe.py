"""From a recipe to a plan: what is asked for, what this machine (or the card named) has.

`plan_recipe` is for `train`, which knows its device; `plan_command` is for `qlora-train plan`, which works
without one: a card is asked through nvidia-smi, or is only a size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from qlora_train.device.description import CPU, Capability, DeviceDescription, planned_gpu
from qlora_train.device.driver import ask_nvidia_smi
from qlora_train.memory.cache_key import PackingKey, cache_root, packed_folder
from qlora_train.memory.plan.byte_walk import GenerateSize
from qlora_train.memory.plan.host_bytes import ONE_RANK, HostBudget, Machine
from qlora_train.memory.plan.model_shape import ModelShape, find_base_folder, find_shape
from qlora_train.memory.plan.plan import Choices, Plan
from qlora_train.memory.plan.planner import make_plan
from qlora_train.memory.plan.time_model import Rates, stated_rates
from qlora_train.memory.plan.workload import dtype_of, workload_of
from qlora_train.model.base_folder import check_base
from qlora_train.recipe import Recipe

_SHARE_OF_FREE_VRAM = 0.95  # the desktop and others move too
_SHARE_OF_FREE_RAM = 0.9


def plan_recipe(
    recipe: Recipe,
    target: DeviceDescription,
    free_bytes: int,
    *,
    shape: ModelShape | None = None,
    documents: Sequence[int] | None = None,
    most_documents: int = 0,
    rates: Rates | None = None,
    has_context: bool = False,
    base_folder: Path | None = None,
    host_budget: HostBudget | None = None,
) -> Plan:
    """The plan of a run on `target`.

    free_bytes: on the device now; memory.vram, where it is given, is the budget instead. shape: None looks
    for model.base. documents: token counts of a micro-batch; None: full bins.
    most_documents: in any micro-batch; 0: not known. rates: None takes stated ones.
    has_context: free_bytes leaves out a CUDA context that exists already. base_folder: of model.base; None
    looks for it. host_budget: None: what is free here, for one rank. The disk of the cache must hold the
    packed base unless it is there already. Raises `UserError` for a base that is unknown; see
    `Plan.require_fit` for one that does not fit.
    """
    base_folder = base_folder or find_base_folder(recipe.model.base, recipe.model.revision)
    if base_folder is not None:
        check_base(base_folder, recipe.model.quantization)
    shape = shape or find_shape(recipe.model.base, recipe.model.revision)
    workload = workload_of(recipe, shape, target, documents, most_documents)
    return make_plan(
        workload,
        device_budget(target, free_bytes, recipe.memory.vram_bytes, has_context=has_context),
        rates or stated_rates(target),
        host_budget or free_host_memory(recipe, target, base_folder),
        Choices(recipe.memory.weights, recipe.memory.activations),
        GenerateSize(prompts=(min(512, recipe.data.sequence_length),)),
    )


def free_host_memory(
    recipe: Recipe, target: DeviceDescription, base_folder: Path | None, machine: Machine = ONE_RANK
) -> HostBudget:
    """RAM and disk that are free on this machine for a run."""
    return HostBudget.of_this_machine(cache_root(), _packed_base(recipe, target, base_folder), machine)


def _packed_base(recipe: Recipe, target: DeviceDescription, base_folder: Path | None) -> Path | None:
    """Where in the cache the packed base is, or will be; None without the base's own files."""
    if base_folder is None:
        return None
    key = PackingKey(recipe.model.quantization, recipe.model.double_quant)
    return packed_folder(cache_root(), base_folder, key, dtype_of(recipe, target))


def device_budget(
    device: DeviceDescription, free_bytes: int, vram_bytes: int | None, *, has_context: bool
) -> int:
    """Bytes that may be used on the device, context included: what is asked for, else most of what is free
    (which leaves a context out that exists already)."""
    if vram_bytes is not None:
        return vram_bytes
    share = _SHARE_OF_FREE_VRAM if device.is_accelerator else _SHARE_OF_FREE_RAM
    return int(free_bytes * share) + (device.context_bytes if has_context else 0)


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi tells it. Bytes."""

    name: str
    free_bytes: int
    capability: Capability


def plan_command(recipe: Recipe) -> tuple[Plan, str]:
    """The plan for this machine's card, for one of the size that memory.vram says, or for the CPU; and in
    words which of them it is."""
    if recipe.lora.init_from is not None:  # reading an adapter's header takes torch's dtypes
        from qlora_train.model.continued_adapter import as_continued

        recipe = recipe.model_copy(update={"lora": as_continued(recipe.lora)})
    card = find_card()
    if card is not None:
        target = planned_gpu(card.name, card.capability)
        return plan_recipe(recipe, target, card.free_bytes), card.name
    if recipe.memory.vram_bytes is not None:
        target = planned_gpu(None, None)
        return plan_recipe(recipe, target, recipe.memory.vram_bytes), "a CUDA card (none is here)"
    if recipe.model.compute_dtype == "auto":
        dtype = "bfloat16" if _multiplies_bfloat16() else "float32"
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"compute_dtype": dtype})})
    return plan_recipe(recipe, CPU, psutil.virtual_memory().available), "the CPU (no CUDA card is here)"


def find_card() -> Card | None:
    """The first GPU, if the driver's tool is here and finds one."""
    for name, free_mib, capability in ask_nvidia_smi("name", "memory.free", "compute_cap")[:1]:
        found = re.fullmatch(r"(\d+) (\d+)\.(\d+)", f"{free_mib} {capability}")
        if found is not None:
            return Card(name, int(found[1]) * 2**20, (int(found[2]), int(found[3])))
    return None


def _multiplies_bfloat16() -> bool:
    """As `model/hub.resolve_dtype` decides it, without torch."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text(encoding="ascii", errors="replace")
