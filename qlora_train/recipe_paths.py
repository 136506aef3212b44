"""Refuses a recipe whose paths are not there, before libraries that take seconds to import are imported."""

from __future__ import annotations

from pathlib import Path

from qlora_train.data.sources import require_source
from qlora_train.errors import BaseModelError
from qlora_train.files.hub import require_folder_or_id
from qlora_train.recipe import Recipe
from qlora_train.recipe.files import is_run_folder


def require_paths(recipe: Recipe) -> None:
    """Raise a `UserError` for a base, adapter or data that is neither on this machine nor can be on the hub.
    The base of a run that has begun may have moved with it (adapter/trained_on.py)."""
    if not is_run_folder(Path(recipe.training.output_dir)):
        require_folder_or_id(recipe.model.base)
    adapter, evaluation = recipe.lora.init_from, recipe.data.eval
    if adapter is not None and not Path(adapter).is_dir():
        raise BaseModelError(f"lora.init_from: there is no folder {adapter}")
    for source in recipe.data.train + (evaluation if isinstance(evaluation, tuple) else ()):
        require_source(source)
