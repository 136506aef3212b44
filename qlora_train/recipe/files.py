"""Where recipes are: bundled ones, and what names one."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_train.errors import RecipeError
from qlora_train.recipe.yaml_file import nearest


def bundled_recipes_dir() -> Path:
    """The folder of bundled recipes: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def bundled_recipes() -> dict[str, Path]:
    """Bundled recipes by name: `NAME.yaml`, or `NAME/recipe.yaml` if it comes with data."""
    root = bundled_recipes_dir()
    alone = {file.stem: file for file in root.glob("*.yaml")}
    folders = {file.parent.name: file for file in root.glob("*/recipe.yaml")}
    return dict(sorted((alone | folders).items()))


def find_recipe(path: str | Path) -> Path:
    """The recipe file that `path` names: itself, its `recipe.yaml`, or the bundled recipe of this name."""
    bundled = bundled_recipes()
    for file in (Path(path), Path(path) / "recipe.yaml", bundled.get(str(path))):
        if file is not None and file.is_file():
            return file
    hint = nearest(str(path), bundled)
    raise RecipeError(
        [f"{path}: no such recipe file or run folder; `qlora-train recipes` lists bundled ones{hint}"]
    )


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a run (train/run_folder.py), not only a recipe with its data."""
    return any(os.path.exists(folder / name) for name in ("plan.json", "metrics.jsonl", "checkpoints"))
