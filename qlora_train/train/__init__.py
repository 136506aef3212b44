"""Training: the layer walk, the optimizer step, the loop around it, and a run's folder.

Imports are made when `train` is called: they take seconds.
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
    """run_dir: the run folder. adapter_dir: the adapter in PEFT format. loss: of the last step; eval_loss:
    the last evaluation's."""

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
    """Train as the recipe says; with `resume`, go on from the newest checkpoint of its output folder.

    use_cache: keep the quantized base for later starts. on_step: told what metrics.jsonl has of a step,
    between that step and the next, on every rank. Raises a `UserError` for bad input and for a plan that
    does not fit, before anything is written; `TrainingFailure` and `OutOfMemory` when training cannot go on;
    `Interrupted` after SIGINT, SIGTERM or SIGHUP, with the state saved."""
    require_unix("train")
    from qlora_train.train.run import run_training

    return run_training(recipe, on_step, resume=resume, use_cache=use_cache)
