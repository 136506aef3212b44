"""`qlora-train plan`: prints the plan of a recipe, from the cache (without importing torch) or a new one."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from qlora_train.files.hub import require_folder_or_id
from qlora_train.plan.plan_cache import cached_plan
from qlora_train.plan.report import print_plan
from qlora_train.plan.request import PlanRequest, request_of
from qlora_train.plan.words import refusal
from qlora_train.recipe import Recipe


def plan_command(
    recipe: Recipe,
    *,
    card: str | None = None,
    ram_bytes: int | None = None,
    disk_bytes: int | None = None,
    as_json: bool = False,
    details: bool = False,
) -> None:
    """Print the plan of a recipe. card, ram_bytes, disk_bytes: see `request_of`. Raises `UserError` where it
    does not fit."""
    request = request_of(recipe, card, ram_bytes, disk_bytes)
    plan = values_of(request)
    if as_json:
        print(json.dumps(plan, indent=1))
    else:
        print_plan(plan, request, Console(), recipe.training.max_steps, details=details)
    if not plan["fits"]:
        raise refusal(plan["problems"], plan["floor"], plan["advice"])


def plan_values(
    recipe: Recipe, *, card: str | None, ram_bytes: int | None, disk_bytes: int | None
) -> dict[str, Any]:
    """The plan of a recipe as plain values; arguments and errors as of `plan_command`, but a plan that does
    not fit is no error."""
    return values_of(request_of(recipe, card, ram_bytes, disk_bytes))


def values_of(request: PlanRequest) -> dict[str, Any]:
    """The plan of a request as plain values, whether it fits or not."""
    require_folder_or_id(request.recipe.model.base)
    plan, num_steps = cached_plan(request, _made_plan), request.recipe.training.max_steps
    seconds = None if num_steps is None else num_steps * plan["step_seconds"]
    return {**plan, "assumed": request.assumed, "seconds_to_the_end": seconds}


def _made_plan(request: PlanRequest) -> dict[str, Any]:
    from qlora_train.plan.from_recipe import plan_request  # with torch

    return plan_request(request)
