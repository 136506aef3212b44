"""The folder of a run: its lock, its checks before training, and its metrics file.

    recipe.yaml      the resolved recipe
    plan.json        train/plan_log.py
    metrics.jsonl    one object per optimizer step and per evaluation
    samples.jsonl    one object per answer to a prompt of training.samples
    checkpoints/     train/checkpoint.py
    adapter/         PEFT format, written at the end

A run never writes into another run's folder, nor do two processes into one: the folder is locked before it is
checked. A resume continues only the recipe that the run began with, apart from keys that do not change what
is computed; rows of metrics.jsonl that are newer than the checkpoint are removed and computed again."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_train.boundary import is_disk_failure, reason_of, require_creatable
from qlora_train.errors import RunFolderError
from qlora_train.files.atomic_file import partial_of, replace_text
from qlora_train.files.folder_lock import lock_folder, remove_leftovers
from qlora_train.files.step_rows import step_rows
from qlora_train.recipe import Recipe, load_recipe

MAY_CHANGE = {
    *("log_every", "eval_every", "save_every", "keep_checkpoints", "report_to", "output_dir"),
    *("early_stopping", "samples"),  # change no step
    *("base", "revision"),  # the weights themselves are compared: a base may move
    *("vram", "weights", "activations", "micro_batch_size"),  # planned anew (plan_log.py)
}
LENGTH = {"epochs", "max_steps"}
"""Keys whose values may grow in a resume, which extends the run (`resumed.lengthened_line`)."""


class RunFolder:
    """Paths of a run, and its metrics file. Creating the object touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self._begun = partial_of(self.recipe_file)  # alone in a folder: a run killed before it began
        self.plan_file = path / "plan.json"
        self.metrics_file = path / "metrics.jsonl"
        self.samples_file = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"

    @contextmanager
    def claimed(self, log: Callable[[str], None] = lambda line: None) -> Iterator[None]:
        """Create and lock the folder while the block runs; it is removed again if it stays empty. log: called
        with a line where the filesystem has no locks.

        Raises `RunFolderError` where another process has locked it, or where no folder can be made."""
        path = self.path.absolute()
        if os.path.exists(path) and path.samefile(path.anchor):
            raise RunFolderError(
                f"{self.path}: is the root of all files, not a folder for a run. Choose another "
                "training.output_dir."
            )
        require_creatable(self.path, RunFolderError, "Choose another training.output_dir.")
        nested = (*reversed(path.parents), self.path)
        made = [path for path in nested if not os.path.lexists(path)]
        try:
            lock = None
            while lock is None:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(self.path)
                if lock is None and self.path.is_dir():
                    raise RunFolderError(
                        f"{self.path}: another run is at work in this folder. Wait until it has ended, or "
                        "choose another training.output_dir."
                    )
        except OSError as error:
            if is_disk_failure(error) and error.errno != errno.EROFS:
                raise
            raise RunFolderError(
                f"{self.path}: no folder can be written here ({reason_of(error)}). Choose another "
                "training.output_dir."
            ) from error
        with lock:
            if not lock.is_certain:
                log(
                    f"{self.path}: this filesystem has no locks, so nothing keeps a second run out of this "
                    "folder"
                )
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # one that is not empty ends it
                    for folder in reversed(made):
                        folder.rmdir()

    def check(self, recipe: Recipe, *, resume: bool) -> None:
        """Raise `RunFolderError` unless the folder is free, or holds a run of this (resolved) recipe that is
        to be resumed."""
        if not self.path.exists() or (self.path.is_dir() and set(self.path.iterdir()) <= {self._begun}):
            if resume:
                raise RunFolderError(
                    f"{self.path}: there is no run to resume. Leave --resume out to start one, or name the "
                    "run's folder (training.output_dir, or the folder itself as RECIPE)."
                )
            return
        if not self.recipe_file.is_file():
            raise RunFolderError(
                f"{self.path}: is not empty and is not a run. Choose another training.output_dir."
            )
        self._refuse_odd_entries()
        if not resume:
            raise RunFolderError(
                f"{self.path}: holds a run already. Continue it with --resume, or choose another "
                "training.output_dir."
            )
        changed = _differences(load_recipe(self.recipe_file), recipe)
        if changed:
            raise RunFolderError(
                f"{self.path}: --resume continues the recipe the run began with, but these keys differ: "
                f"{', '.join(changed)}. Set them back, or start a new run in another training.output_dir "
                "(lora.init_from goes on from this run's adapter)."
            )

    def begun_recipe(self) -> Recipe | None:
        """The recipe of an earlier part of this run; None: there was none."""
        return load_recipe(self.recipe_file) if self.recipe_file.is_file() else None

    def _refuse_odd_entries(self) -> None:
        """Raise `RunFolderError` where a file stands in a folder's place or the other way round, which would
        fail at the first save."""
        for path in (self.plan_file, self.metrics_file, self.samples_file, self.checkpoints, self.adapter):
            is_right = path.is_dir() if path in (self.checkpoints, self.adapter) else path.is_file()
            if os.path.lexists(path) and not is_right:
                kind = "folder" if path in (self.checkpoints, self.adapter) else "file"
                raise RunFolderError(f"{path}: must be a {kind} of the run and is none. Remove it.")

    def begin(self, recipe: Recipe) -> None:
        """Create the folder, remove partial files of killed processes, and save the resolved recipe."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)
        replace_text(self.recipe_file, recipe.to_yaml())

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl. Numbers that are not finite become null, as JSON has none."""
        finite = {key: None if _is_not_finite(value) else value for key, value in row.items()}
        _append(self.metrics_file, [finite])

    def append_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append objects to samples.jsonl."""
        _append(self.samples_file, rows)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without damaged lines."""
        return step_rows(self.metrics_file)

    def cut_rows(self, last_step: int) -> None:
        """Remove the metrics and samples of steps after `last_step`, and damaged lines."""
        for file in filter(Path.is_file, (self.metrics_file, self.samples_file)):
            kept = [row for row in step_rows(file) if row["step"] <= last_step]
            replace_text(file, "".join(json.dumps(row) + "\n" for row in kept))


def _append(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _differences(saved: Recipe, wanted: Recipe) -> list[str]:
    """The keys whose values differ between two recipes, apart from those that may change."""
    before, after = saved.model_dump(), wanted.model_dump()
    return [
        f"{section}.{key}"
        for section, values in before.items()
        for key, value in values.items()
        if key not in MAY_CHANGE | LENGTH and unmoved(value) != unmoved(after[section][key])
    ]


def unmoved(value: Any) -> Any:
    """A recipe value with absolute paths cut to their last part: contents are compared by whoever reads
    them."""
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.basename(value)
    if isinstance(value, list | tuple):
        return [unmoved(item) for item in value]
    if isinstance(value, dict):  # of keys of lora.rank_pattern the first that matches decides
        return [(key, unmoved(item)) for key, item in value.items()]
    return value
