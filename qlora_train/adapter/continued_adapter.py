"""`lora.init_from`: training continues an adapter, which decides modules, ranks and scalings.

Keys that the recipe leaves out are the adapter's; keys that it gives must agree with the adapter
(`all-linear` alone always does). The trained modules are exactly those with LoRA parameters in the adapter,
as PEFT loads it: possibly some layers only, or with a rank or alpha of their own, and weights of experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_train.adapter.adapter_config import HEAD, match_modules, name_parameters, name_targets
from qlora_train.adapter.adapter_files import adapter_shapes
from qlora_train.adapter.lora_targets import LoraTarget, choose_paths, choose_targets
from qlora_train.errors import BaseModelError
from qlora_train.recipe import LoraSection
from qlora_train.recipe.checks import NO_DROPOUT_WITH_DORA, NO_DROPOUT_WITH_EXPERTS
from qlora_train.recipe.module_patterns import last_name, pattern_of

_Existing = tuple[list[str], list[str]]
"""Paths of the base's linears, and of its experts' parameters."""


def as_continued(lora: LoraSection, linears: Iterable[str], experts: Iterable[str] = ()) -> LoraSection:
    """The section with the adapter's values filled in; unchanged without `init_from`.

    linears: paths of the base's linear layers. experts: paths of its experts' parameters. Raises
    `BaseModelError` where the recipe contradicts the adapter, or the base lacks a module.
    """
    if lora.init_from is None:
        return lora
    folder, existing = Path(lora.init_from), (list(linears), list(experts))
    config, shapes = adapter_shapes(folder)
    own: dict[str, Any] = {
        "rank": config.rank,
        "alpha": _plain(config.alpha),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
    }
    if wrong := [key for key in own if key in lora.model_fields_set and getattr(lora, key) != own[key]]:
        needed = ", ".join(f"lora.{key} {str(value).lower()}" for key, value in own.items())
        raise BaseModelError(
            f"lora.init_from: {folder} has another {' and '.join(wrong)} than the recipe says. Leave these "
            f"keys out, or write what the adapter has: {needed}."
        )
    paths = [path for path in shapes if last_name(path) != HEAD]
    names = match_modules(paths, [*existing[0], *existing[1]])
    if strange := [path for path in paths if path not in names]:
        raise BaseModelError(
            f"lora.init_from: {folder} has LoRA parameters for {strange[0]} (and {len(strange) - 1} more "
            f"modules), which this base does not have (the adapter names {config.base_model or 'no'} base)."
        )
    has = {names[path]: LoraTarget(config.rank_of(path), _plain(config.alpha_of(path))) for path in paths}
    continued = lora.model_copy(
        update=own | _left_out(lora, has, config.rank, _plain(config.alpha), existing)
    )
    _require_same(continued, has, existing)
    if continued.use_dora and continued.dropout:
        raise BaseModelError(f"lora.dropout: {NO_DROPOUT_WITH_DORA} ({folder} uses DoRA)")
    if continued.target_parameters and continued.dropout:
        raise BaseModelError(f"lora.dropout: {NO_DROPOUT_WITH_EXPERTS} ({folder} has LoRA on experts)")
    return continued


def _left_out(
    lora: LoraSection, has: dict[str, LoraTarget], rank: int, alpha: float, existing: _Existing
) -> dict[str, Any]:
    """The values of keys that the recipe leaves out: which linears, and with which ranks and alphas. has: the
    adapter's targets; rank, alpha: those of its modules without a pattern."""
    own: dict[str, Any] = {}
    if lora.target_modules == "all-linear" and lora.exclude_modules is lora.layers_to_transform is None:
        targets, layers = name_targets(has.keys() - set(existing[1]), existing[0])
        own |= {"target_modules": tuple(targets), "layers_to_transform": layers and tuple(layers)}
    if lora.target_parameters is None:
        own["target_parameters"] = tuple(name_parameters(has.keys() & set(existing[1]), existing[1])) or None
    if not lora.rank_pattern:
        own["rank_pattern"] = pattern_of({path: target.rank for path, target in has.items()}, rank)
    if not lora.alpha_pattern:
        own["alpha_pattern"] = pattern_of({path: target.alpha for path, target in has.items()}, alpha)
    return own


def _require_same(lora: LoraSection, has: dict[str, LoraTarget], existing: _Existing) -> None:
    """Raise `BaseModelError` unless the section says what the adapter has."""
    if different := sorted(has.keys() ^ set(choose_paths(lora, *existing))):
        raise BaseModelError(
            "what lora.target_modules, target_parameters, exclude_modules and layers_to_transform choose "
            f"differs from the modules of lora.init_from in {len(different)} modules, such as "
            f"{different[0]}. Leave these keys out: the adapter's own modules are trained."
        )
    for path, target in choose_targets(lora, *existing).items():
        if target != has[path]:
            raise BaseModelError(
                f"lora.rank_pattern and lora.alpha_pattern give {path} rank {target.rank} and alpha "
                f"{target.alpha}, the adapter of lora.init_from has rank {has[path].rank} and alpha "
                f"{has[path].alpha}. Leave these keys out: the adapter's own are taken."
            )


def _plain(number: float) -> float:
    """The number as recipes write it: an int where it is whole."""
    return int(number) if number == int(number) else number
