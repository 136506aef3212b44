"""What a run may use of a device, of RAM and of the disk. Imports no torch."""

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
    """How a run sits on one machine. num_ranks: its processes there. num_copies: of what waits in RAM for all
    of them: 1, or one for each rank."""

    num_ranks: int = 1
    num_copies: int = 1


ONE_RANK = Machine()


@dataclass(frozen=True)
class HostBudget:
    """Bytes of RAM and disk that a run may use on a machine, by all its ranks there. has_quantized_base: an
    earlier start has put it on the disk, so no room is needed for it. keeps_quantized_base: it is kept there
    for later starts."""

    ram_bytes: int
    disk_bytes: int
    has_quantized_base: bool = False
    machine: Machine = ONE_RANK
    keeps_quantized_base: bool = True

    @staticmethod
    def of_this_machine(
        cache: Path, quantized_base: Path | None = None, machine: Machine = ONE_RANK
    ) -> HostBudget:
        """What is free now. cache: the folder of quantized bases (it need not exist yet). quantized_base:
        where in it the run's own is, or will be; None: not known."""
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
    """Bytes that may be used on the device, context included: what is asked for, else most of what is free
    (which leaves a context out that exists already)."""
    if vram_bytes is not None:
        return vram_bytes
    share = _SHARE_OF_FREE_VRAM if device.is_accelerator else _SHARE_OF_FREE_RAM
    return int(free_bytes * share) + (device.context_bytes if has_context else 0)


def usable_ram(num_bytes: int) -> int:
    """Of so much, what is left when the system and others move too."""
    return int(num_bytes * _SHARE_OF_FREE_RAM)


def free_host_memory(
    recipe: Recipe, target: DeviceDescription, base_folder: Path | None, machine: Machine = ONE_RANK
) -> HostBudget:
    """RAM and disk that are free on this machine for a run."""
    return HostBudget.of_this_machine(cache_root(), _quantized_base(recipe, target, base_folder), machine)


def _quantized_base(recipe: Recipe, target: DeviceDescription, base_folder: Path | None) -> Path | None:
    """Where in the cache the quantized base is, or will be; None without the base's own files."""
    if base_folder is None:
        return None
    key = Quantization(recipe.model.quantization, recipe.model.double_quant)
    return quantized_folder(cache_root(), base_folder, key, dtype_of(recipe, target))


def dtype_of(recipe: Recipe, target: DeviceDescription) -> str:
    """The compute dtype; `auto`, unless resolved before, counts as bfloat16 on a GPU that multiplies it, as
    float16 on another, and as float32 on a CPU."""
    dtype = recipe.model.compute_dtype
    if dtype != "auto":
        return dtype
    if not target.is_accelerator:
        return "float32"
    return "bfloat16" if target.has_bfloat16 else "float16"
