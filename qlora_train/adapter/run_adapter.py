"""Finds an adapter in a run folder: the finished one, the best, the last, or that of a step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_train.adapter.trained_on import progress_of
from qlora_train.boundary import reason_of
from qlora_train.errors import RunFolderError
from qlora_train.files.sealed_json import unseal


def find_adapter(run: Path, checkpoint: str | None, log: Callable[[str], None]) -> Path:
    """The adapter folder of a run.

    checkpoint: "best" by evaluation, "last", or "step-N"; None: the one in `adapter`, else the last
    checkpoint's. log: called with a line where it is not that of a finished run. Raises `RunFolderError`
    where there is no such adapter.
    """
    if not (run / "recipe.yaml").is_file():
        raise RunFolderError(
            f"{run}: not a run folder: recipe.yaml is missing. Give the folder that training wrote."
        )
    steps = _steps(run)
    if checkpoint is None and (run / "adapter").is_dir():
        adapter = run / "adapter"
    elif checkpoint is None and not steps:
        raise RunFolderError(
            f"{run}: has no adapter yet, and no checkpoint; train it (qlora-train train {run} --resume)"
        )
    else:
        adapter = run / "checkpoints" / f"step-{_step(run, checkpoint or 'last', steps)}" / "adapter"
    progress = progress_of(adapter)
    if progress is not None and (checkpoint is not None or progress[0] < progress[1]):
        log(f"the adapter of step {progress[0]} of {progress[1]}")
    return adapter


def _step(run: Path, checkpoint: str, steps: list[int]) -> int:
    """The step of "best", "last" or "step-N". Raises `RunFolderError` where it has no checkpoint."""
    there = ", ".join(f"step-{step}" for step in steps) or "none"
    if not steps:
        raise RunFolderError(f"{run}: has no checkpoint that {checkpoint} could name.")
    if checkpoint == "last":
        return steps[-1]
    if checkpoint == "best":
        best = _state(run / "checkpoints" / f"step-{steps[-1]}" / "state.json").get("best_step")
        if best is None:
            raise RunFolderError(
                f"{run}: no evaluation gave a finite loss (or there was none, without data.eval in the "
                f"recipe), so no checkpoint is the best; there are {there}, and last."
            )
        if best not in steps:
            raise RunFolderError(f"{run}: step {best} was the best, but was not saved; there are {there}.")
        return int(best)
    found = re.fullmatch(r"step-(\d+)", checkpoint)
    if found is None or int(found[1]) not in steps:
        raise RunFolderError(f"{run}: has no checkpoint {checkpoint}; there are {there}, and best and last.")
    return int(found[1])


def _state(file: Path) -> dict[str, Any]:
    try:
        return unseal(file)
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{file}: does not read ({reason_of(error)}), so the best step is not known. Name a step."
        ) from error


def _steps(run: Path) -> list[int]:
    """The steps with a checkpoint that holds an adapter, ascending."""
    names = (re.fullmatch(r"step-(\d+)", path.parent.name) for path in run.glob("checkpoints/*/adapter"))
    return sorted(int(name[1]) for name in names if name)
