"""The folder of a run: who may use it, and what is appended to it.

    recipe.yaml      the resolved recipe
    plan.json        train/plan_log.py
    metrics.jsonl    one object per optimizer step and per evaluation
    checkpoints/     train/checkpoint.py
    adapter/         PEFT format, written at the end

A run never writes into another run's folder. A resume continues only the recipe it began with, apart from
keys that do not touch what is computed; rows of metrics.jsonl that are newer than the checkpoint are cut off
and computed again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qlora_train.errors import RunFolderError
from qlora_train.recipe import Recipe, load_recipe

MAY_CHANGE = {"log_every", "eval_every", "save_every", "keep_checkpoints", "report_to", "output_dir"}


class RunFolder:
    """Paths of a run, and its metrics file. Creating the object touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self._begun = _partial(self.recipe_file)  # alone in a folder: a run killed before it began
        self.plan_file = path / "plan.json"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"

    def check(self, recipe: Recipe, *, resume: bool) -> None:
        """Raise `RunFolderError` unless the folder is free, or holds a run of this (resolved) recipe that is
        to be resumed."""
        lies_in = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not lies_in.is_dir():
            raise RunFolderError(
                f"{self.path}: {lies_in} is a file, so no folder can be made in it. Choose another "
                "training.output_dir."
            )
        if not self.path.exists() or (self.path.is_dir() and set(self.path.iterdir()) <= {self._begun}):
            return
        if not self.recipe_file.is_file():
            raise RunFolderError(
                f"{self.path}: is not empty and is not a run. Choose another training.output_dir."
            )
        if not resume:
            raise RunFolderError(
                f"{self.path}: holds a run already. Continue it with --resume, or choose another "
                "training.output_dir."
            )
        changed = _differences(load_recipe(self.recipe_file), recipe)
        if changed:
            raise RunFolderError(
                f"{self.path}: --resume continues the recipe the run began with, but these keys differ: "
                f"{', '.join(changed)}. Set them back, or start a new run in another training.output_dir."
            )

    def begin(self, recipe: Recipe) -> None:
        """Create the folder and save the resolved recipe."""
        self.path.mkdir(parents=True, exist_ok=True)
        _replace(self.recipe_file, recipe.to_yaml())

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one object to metrics.jsonl. A number that is not finite becomes null, as JSON has none."""
        finite = {key: None if _is_not_finite(value) else value for key, value in row.items()}
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def cut_metrics(self, last_step: int) -> None:
        """Drop the rows of steps after `last_step`, and a last line that a crash cut in half."""
        if not self.metrics_file.is_file():
            return
        kept = []
        for line in self.metrics_file.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if row["step"] <= last_step:
                kept.append(line)
        _replace(self.metrics_file, "".join(line + "\n" for line in kept))


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _partial(file: Path) -> Path:
    return file.with_suffix(".partial")


def _replace(file: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    partial = _partial(file)
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _differences(saved: Recipe, wanted: Recipe) -> list[str]:
    """Keys whose values differ, apart from those that may change."""
    before, after = saved.model_dump(), wanted.model_dump()
    return [
        f"{section}.{key}"
        for section, values in before.items()
        for key, value in values.items()
        if value != after[section][key] and key not in MAY_CHANGE
    ]
