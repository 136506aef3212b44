"""A cache of plans, so that the same request is answered at once. Imports no torch.

A plan depends on the recipe, the base's config, the device, the free memory and disk, and this program. All
but the free bytes is hashed into the file's name. Free bytes drift from one call to the next, so a cached
plan is used while it fits and they are within `DRIFT` of what it was made for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import qlora_train
from qlora_train.files.atomic_file import replace_text
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.plan.base_config import find_config
from qlora_train.plan.host_budget import device_budget
from qlora_train.plan.request import PlanRequest
from qlora_train.weights.cache_key import cache_root

RATES_FILE = "rates.json"
FOLDER = "plans"
MOST_PLANS = 100
DRIFT = 0.05
"""Relative change of free memory and disk up to which a cached plan is used."""


def cached_plan(request: PlanRequest, make: Callable[[PlanRequest], dict[str, Any]]) -> dict[str, Any]:
    """The cached plan of a request, or a new one from `make`, which is then cached. A cache file that cannot
    be read or written only costs time."""
    folder = cache_root() / FOLDER
    file = folder / f"{_fingerprint(request)}.json"
    room = _room(request)
    with contextlib.suppress(OSError, ValueError):
        kept = unseal(file)
        if kept["plan"]["fits"] and _still_holds(kept["plan"], kept["room"], room):
            return dict(kept["plan"])
    plan = make(request)
    if plan["fits"]:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(file, seal({"room": room, "plan": plan}), is_shared=True)
            _forget_old(folder)
    return plan


def _room(request: PlanRequest) -> dict[str, int]:
    """Bytes that the request may use of device memory, RAM and disk."""
    vram_bytes = request.recipe.memory.vram_bytes
    return {
        "vram": device_budget(request.target, request.free_bytes, vram_bytes, has_context=False),
        "ram": request.host.ram_bytes,
        "disk": request.host.disk_bytes,
    }


def _still_holds(plan: Mapping[str, Any], before: Mapping[str, int], now: Mapping[str, int]) -> bool:
    """Whether a plan fits into the bytes there are now, and they are nearly those of before."""
    needed = {"vram": plan["peak_vram_bytes"], "ram": plan["peak_ram_bytes"], "disk": plan["disk_bytes"]}
    return all(
        needed[name] <= now[name] and abs(now[name] - before[name]) <= DRIFT * before[name] for name in needed
    )


def _fingerprint(request: PlanRequest) -> str:
    """Hash of everything that a plan depends on, apart from free bytes."""
    recipe = request.recipe
    values = recipe.to_dict()
    training = {k: v for k, v in values["training"].items() if k not in ("output_dir", "seed", "report_to")}
    follows_from = {
        "recipe": [
            values["model"],
            recipe.lora.model_dump_json(),
            training,
            values["memory"],
            recipe.data.sequence_length,
        ],
        "config": dict(find_config(recipe.model.base, recipe.model.revision)),
        "adapter": _files_of(recipe.lora.init_from),
        "target": asdict(request.target),
        "has_quantized_base": request.host.has_quantized_base,
        "is_here": request.is_here,
        "rates": _content(cache_root() / RATES_FILE) if request.is_here else "",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "program": [qlora_train.__version__, *_files_of(str(Path(qlora_train.__file__).parent))],
    }
    text = json.dumps(follows_from, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _files_of(folder: str | None) -> list[str]:
    """Name, size and time of every program, JSON and weight file below a folder."""
    if folder is None:
        return []
    files = sorted(
        path for path in Path(folder).rglob("*") if path.suffix in (".py", ".json", ".safetensors")
    )
    return [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]


def _content(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def _forget_old(folder: Path) -> None:
    """Remove all but the newest `MOST_PLANS` plans."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[MOST_PLANS:]:
        file.unlink(missing_ok=True)
