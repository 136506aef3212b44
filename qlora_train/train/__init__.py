"""Training: preparing a run, the loop over optimizer steps, checkpoints and the run folder.

Heavy libraries are imported when `train` is called, as importing them takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_train.device.system import require_unix
from qlora_train.recipe import Recipe

__all__ = ["OnStep", "TrainResult", "train"]

OnStep = Callable[[Mapping[str, float | int | bool]], None]


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. run_dir: the run folder. adapter_dir: the adapter in PEFT format. num_steps: the
    steps that were trained. loss: the loss of the last step. eval_loss: that of the last evaluation."""

    run_dir: Path
    adapter_dir: Path
    num_steps: int
    loss: float | None
    eval_loss: float | None


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    use_cache: bool = True,
    on_step: OnStep = lambda row: None,
) -> TrainResult:
    """Train as the recipe says; with `resume`, continue from the newest checkpoint of its output folder.

    use_cache: keep the quantized base and tokens for later starts. on_step: called on every rank after each
    step with its row of metrics.jsonl. Raises a `UserError` for bad input and for a plan that does not fit,
    before anything is written; `TrainingFailure` and `OutOfMemory` when training cannot go on; `Interrupted`
    after SIGINT, SIGTERM or SIGHUP, with the state saved."""
    require_unix("train")
    from qlora_train.recipe_paths import require_paths

    require_paths(recipe)
    from qlora_train.train.run import run_training

    return run_training(recipe, on_step, resume=resume, use_cache=use_cache)
