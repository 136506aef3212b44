"""The planner: predicts a run's memory and time, and chooses how it runs, before anything is loaded.

Bytes come from running the program on meta tensors, which have shapes but no data (planned_walk.py); seconds
come from counts of FLOPs and copied bytes (time_model.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_train.recipe import Recipe

__all__ = ["plan"]


def plan(
    recipe: Recipe,
    *,
    card: str | None = None,
    ram_bytes: int | None = None,
    disk_bytes: int | None = None,
) -> dict[str, Any]:
    """The plan of a recipe as plain values, what `qlora-train plan --json` prints; `fits` says whether it
    does.

    card, ram_bytes, disk_bytes: of another machine, see `plan.request.request_of`. Raises a `UserError` for a
    base that cannot be trained."""
    from qlora_train.plan.command import plan_values

    return plan_values(recipe, card=card, ram_bytes=ram_bytes, disk_bytes=disk_bytes)
