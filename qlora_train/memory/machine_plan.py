"""The plan of a recipe on the machine that is about to run it: its free memory, its measured rates."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_train.memory import meter
from qlora_train.memory.measured_rates import rates_of
from qlora_train.memory.packed_cache import cache_root
from qlora_train.memory.plan.from_recipe import plan_recipe
from qlora_train.memory.plan.model_shape import find_shape
from qlora_train.memory.plan.plan import Plan
from qlora_train.memory.plan.workload import DeviceKind
from qlora_train.recipe import Recipe


def plan_here(recipe: Recipe, folder: Path, dtype: torch.dtype, device: torch.device) -> Plan:
    """recipe: with the compute dtype resolved to `dtype`. folder: the base's. See `Plan.require_fit`."""
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    return plan_recipe(
        recipe,
        kind,
        meter.free_bytes(device),
        shape=find_shape(str(folder)),
        rates=rates_of(device, dtype, cache_root()),
        has_context=kind == "cuda",
        cache=cache_root(),
    )
