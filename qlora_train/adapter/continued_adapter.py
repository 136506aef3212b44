"""`lora.init_from`: training continues an adapter, which decides modules, ranks and scalings.

Keys that the recipe leaves out are the adapter's; keys that it gives must agree with the adapter
(`all-linear` always does). The trained modules are exactly those with LoRA parameters in the adapter, as PEFT
loads it: possibly some layers only, or with a rank or alpha of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_train.adapter.adapter_config import HEAD, AdapterConfig, match_modules, shortest_names
from qlora_train.adapter.adapter_files import adapter_shapes
from qlora_train.errors import BaseModelError
from qlora_train.recipe import LoraSection


def as_continued(lora: LoraSection, linears: Iterable[str] | None = None) -> LoraSection:
    """The section with the adapter's values filled in; unchanged without `init_from`.

    linears: paths of the base's linear layers; None: unknown, and the adapter's own paths are used. Raises
    `BaseModelError` where the recipe contradicts the adapter, or the base lacks a module.
    """
    if lora.init_from is None:
        return lora
    folder = Path(lora.init_from)
    config, shapes = adapter_shapes(folder)
    own: dict[str, Any] = {
        "rank": config.rank,
        "alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "use_rslora": config.use_rslora,
    }
    written = lora.model_fields_set
    if wrong := [key for key, value in own.items() if key in written and getattr(lora, key) != value]:
        needed = ", ".join(f"lora.{key} {str(value).lower()}" for key, value in own.items())
        raise BaseModelError(
            f"lora.init_from: {folder} has another {' and '.join(wrong)} than the recipe says. Leave these "
            f"keys out, or write what the adapter has: {needed}."
        )
    own["target_modules"] = tuple(_targets(folder, config, [*shapes], linears))
    if "target_modules" in written and lora.target_modules != "all-linear":
        own["target_modules"] = _as_written(lora, own["target_modules"], linears)
    return lora.model_copy(update=own)


def _targets(
    folder: Path, config: AdapterConfig, paths: list[str], linears: Iterable[str] | None
) -> list[str]:
    """`target_modules` for the adapter's modules, apart from the head."""
    paths = [path for path in paths if path.rpartition(".")[2] != HEAD]
    if linears is None:
        return paths
    existing = list(linears)
    names = match_modules(paths, existing)
    if strange := [path for path in paths if path not in names]:
        raise BaseModelError(
            f"lora.init_from: {folder} has factors for {strange[0]} (and {len(strange) - 1} more modules), "
            f"which this base does not have (the adapter names {config.base_model or 'no'} base)."
        )
    return shortest_names(names.values(), existing)


def _as_written(lora: LoraSection, own: tuple[str, ...], linears: Iterable[str] | None) -> Any:
    """`target_modules` as the recipe writes them. Raises `BaseModelError` unless they select the adapter's
    modules."""
    existing = list(linears or ())
    asked, has = (set(_chosen(targets, existing)) for targets in (lora.target_modules, own))
    if asked != has:
        different = sorted(asked ^ has)
        raise BaseModelError(
            f"lora.target_modules differs from the modules of lora.init_from in {len(different)} modules, "
            f"such as {different[0]}. Leave target_modules out: the adapter's own are trained."
        )
    return lora.target_modules


def _chosen(targets: str | Iterable[str], existing: list[str]) -> list[str]:
    if isinstance(targets, str):
        return existing
    endings = tuple(targets)
    return [name for name in existing if any(name == e or name.endswith(f".{e}") for e in endings)]
