"""Budgets: the bytes of device memory, RAM and disk that a run may use. Imports no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from qlora_train.device.description import DeviceDescription
from qlora_train.errors import UserError
from qlora_train.recipe import Recipe
from qlora_train.weights.cache_key import Quantization, cache_root, is_complete, quantized_folder

_SHARE_OF_FREE_VRAM = 0.95  # the desktop and others move too
_SHARE_OF_FREE_RAM = 0.9


@dataclass(frozen=True)
class Machine:
    """The ranks of a run on one machine. num_ranks: its processes there. num_copies: copies of the weights in
    RAM: 1 where the ranks share it, else one for each."""

    num_ranks: int = 1
    num_copies: int = 1


ONE_RANK = Machine()


@dataclass(frozen=True)
class HostBudget:
    """Bytes of RAM and disk that all ranks of a run may use on one machine. has_quantized_base: the quantized
    base is in the cache already, so it needs no room. keeps_quantized_base: it is kept there for later
    starts."""

    ram_bytes: int
    disk_bytes: int
    has_quantized_base: bool = False
    machine: Machine = ONE_RANK
    keeps_quantized_base: bool = True

    @staticmethod
    def of_this_machine(
        cache: Path, quantized_base: Path | None = None, machine: Machine = ONE_RANK
    ) -> HostBudget:
        """The budget of what is free now. cache: the folder of quantized bases (it need not exist yet).
        quantized_base: the folder of the run's own in it, made or not; None: unknown."""
        folder = next((f for f in (cache, *cache.absolute().parents) if f.exists()), None)
        if folder is None:
            raise UserError(f"{cache}: there is no such drive for the cache; set QLORA_TRAIN_CACHE")
        return HostBudget(
            usable_ram(psutil.virtual_memory().available),
            shutil.disk_usage(folder).free,
            quantized_base is not None and is_complete(quantized_base),
            machine,
        )


def device_budget(
    device: DeviceDescription, free_bytes: int, vram_bytes: int | None, *, has_context: bool
) -> int:
    """Bytes that may be used on the device, context included: vram_bytes if given, else most of free_bytes.
    has_context: a context exists already, so free_bytes is without it."""
    if vram_bytes is not None:
        return vram_bytes
    share = _SHARE_OF_FREE_VRAM if device.is_accelerator else _SHARE_OF_FREE_RAM
    return int(free_bytes * share) + (device.context_bytes if has_context else 0)


def usable_ram(num_bytes: int) -> int:
    """Bytes of num_bytes of free RAM that a run may use; the rest is left to other processes."""
    return int(num_bytes * _SHARE_OF_FREE_RAM)


def free_host_memory(
    recipe: Recipe, target: DeviceDescription, base_folder: Path | None, machine: Machine = ONE_RANK
) -> HostBudget:
    """The budget of RAM and disk that are free on this machine, for a run of this recipe."""
    return HostBudget.of_this_machine(cache_root(), _quantized_base(recipe, target, base_folder), machine)


def _quantized_base(recipe: Recipe, target: DeviceDescription, base_folder: Path | None) -> Path | None:
    """The folder of the quantized base in the cache, made or not; None without the base's own files."""
    if base_folder is None:
        return None
    key = Quantization(recipe.model.quantization, recipe.model.double_quant)
    return quantized_folder(cache_root(), base_folder, key, dtype_of(recipe, target), recipe.lora)


def dtype_of(recipe: Recipe, target: DeviceDescription) -> str:
    """The compute dtype to plan with. `auto` counts as bfloat16 on a GPU with bfloat16 arithmetic, float16 on
    another, float32 on a CPU."""
    dtype = recipe.model.compute_dtype
    if dtype != "auto":
        return dtype
    if not target.is_accelerator:
        return "float32"
    return "bfloat16" if target.has_bfloat16 else "float16"
