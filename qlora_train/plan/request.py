"""The request of `qlora-train plan`: a recipe and the machine to plan for. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from qlora_train.device.cards import (
    ASSUMED_CARD,
    CARDS,
    Capability,
    cards_of_any_memory,
    known_card,
    nearest_cards,
)
from qlora_train.device.description import CPU, DeviceDescription, planned_gpu
from qlora_train.device.driver import ask_nvidia_smi, first_uuid
from qlora_train.errors import UserError
from qlora_train.plan.base_config import find_base_folder
from qlora_train.plan.host_budget import HostBudget, free_host_memory, usable_ram
from qlora_train.plan.words import gib
from qlora_train.recipe import Recipe
from qlora_train.units import GIB


@dataclass(frozen=True)
class PlanRequest:
    """A recipe and the machine to plan for. recipe: its compute dtype resolved if planned for a CPU.
    free_bytes: on the device. is_here: the device is this machine's, so that rates measured here hold.
    device_text: name of the device. assumed: what is assumed of a machine that is not here, as text."""

    recipe: Recipe
    target: DeviceDescription
    free_bytes: int
    host: HostBudget
    is_here: bool
    device_text: str
    assumed: str = ""


@dataclass(frozen=True)
class FoundCard:
    """The GPU that a run would take, and its free bytes."""

    name: str
    free_bytes: int
    capability: Capability


def request_of(
    recipe: Recipe, card: str | None = None, ram_bytes: int | None = None, disk_bytes: int | None = None
) -> PlanRequest:
    """The request for the first of these that there is: the named card, this machine's GPU, a GPU with
    memory.vram bytes, the CPU.

    ram_bytes: all RAM of the machine, a part of which is left to others. disk_bytes: free disk. None: what is
    free here. Raises `UserError` for a card that is not in the table."""
    request = _device_of(recipe, card)
    recipe = request.recipe
    folder = find_base_folder(recipe.model.base, recipe.model.revision)
    host = free_host_memory(recipe, request.target, folder)
    assumed = [request.assumed] if request.assumed else []
    if ram_bytes is not None:
        host = replace(host, ram_bytes=usable_ram(ram_bytes))
        assumed.append(f"{gib(ram_bytes)} of RAM, {gib(host.ram_bytes)} of it free")
        if not request.target.is_accelerator:
            request = replace(request, free_bytes=ram_bytes)
    elif card is not None:
        assumed.append(f"the RAM that is free here ({gib(host.ram_bytes)})")
    if disk_bytes is not None:
        host = replace(host, disk_bytes=disk_bytes, has_quantized_base=False)
        assumed.append(f"{gib(disk_bytes)} of free disk")
    elif card is not None:
        assumed.append(f"the disk that is free here ({gib(host.disk_bytes)})")
    return replace(request, host=host, assumed=", ".join(assumed))


def _device_of(recipe: Recipe, card: str | None) -> PlanRequest:
    """The request for the device, without budgets of RAM and disk."""
    nothing = HostBudget(0, 0)
    if card is not None:
        name = known_card(card)
        if name is None:
            raise UserError(_not_known(card))
        memory_gib = CARDS[name].memory_gib
        target = planned_gpu(name, None)
        return PlanRequest(
            recipe, target, memory_gib * GIB, nothing, False, name, f"{name} with {memory_gib} GiB"
        )
    found = find_card()
    if found is not None:
        target = planned_gpu(found.name, found.capability)
        return PlanRequest(recipe, target, found.free_bytes, nothing, True, found.name)
    if recipe.memory.vram_bytes is not None:
        target = planned_gpu(None, None)
        text = "a CUDA card (none is here)"
        return PlanRequest(recipe, target, recipe.memory.vram_bytes, nothing, False, text)
    if recipe.model.compute_dtype == "auto":
        dtype = "bfloat16" if _multiplies_bfloat16() else "float32"
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"compute_dtype": dtype})})
    free_bytes = psutil.virtual_memory().available
    return PlanRequest(recipe, CPU, free_bytes, nothing, True, "the CPU (no CUDA card is here)")


def _not_known(card: str) -> str:
    """What is wrong with the name of a card that is not in the table, and what to say instead."""
    if not card.strip():
        return '--card: is empty; name a card, such as "RTX 4090"'
    same = cards_of_any_memory(card)
    if same:
        sizes = " or ".join(str(CARDS[name].memory_gib) for name in same)
        return f'--card {card}: has {sizes} GB; for other cards, write --card "{same[0]}" memory.vram=SIZE'
    near = nearest_cards(card)
    hint = f"did you mean {', '.join(near)}?" if near else f"those are {', '.join(CARDS)}."
    example = near[0] if near else ASSUMED_CARD
    return (
        f"--card {card}: is not in the table of cards; {hint} For another card, name one of the table "
        f'that is about as fast, and its memory: --card "{example}" memory.vram=16GiB'
    )


def find_card() -> FoundCard | None:
    """The GPU that a run would take; None without one. A slice of a GPU counts as the whole."""
    uuid = first_uuid()
    if uuid is None:
        return None
    rows = ask_nvidia_smi("uuid", "name", "memory.free", "compute_cap")
    for _, name, free_mib, capability in sorted(rows, key=lambda row: row[0] != f"GPU-{uuid}")[:1]:
        found = re.fullmatch(r"(\d+) (\d+)\.(\d+)", f"{free_mib} {capability}")
        if found is not None:
            return FoundCard(name, int(found[1]) * 2**20, (int(found[2]), int(found[3])))
    return None


def free_here() -> tuple[int, int]:
    """(free bytes of this machine's GPU, 0 without one; bytes of RAM that a run may use)."""
    card = find_card()
    return card.free_bytes if card else 0, usable_ram(psutil.virtual_memory().available)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16, as device/compute_dtype.py decides it, but without torch."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text(encoding="ascii", errors="replace")
