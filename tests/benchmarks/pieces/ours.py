"""This trainer, as its users run it: a recipe goes into `qlora_train.train`, and the run's own files say what
it did.

metrics.jsonl has seconds and tokens of every step. recipe.yaml appears when everything is loaded and before
the first step: its time is the end of loading. The first two steps are metered (the run compares them with
its plan), so at least two must be warm-up.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.pieces.figures import Step, age_seconds, compute_dtype, training_figures
from benchmarks.process import answer
from qlora_train.device.compute_dtype import dtype_name
from qlora_train.device.context import in_use_before
from qlora_train.recipe import Recipe
from qlora_train.train import train


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: inputs; rank, optimizer, sequence_length, micro_batch_size, accumulation, num_warm_up,
    num_timed; and optionally recipe, sections that change the recipe, and use_cache."""
    in_use_before()  # as in a user's process, which does not look at the device before `train` does
    with tempfile.TemporaryDirectory(prefix="qlora-bench-run-") as name:
        run = Path(name) / "run"
        recipe = Recipe.from_dict(recipe_values(arguments, run))
        age_before, started = age_seconds(), time.time()
        train(recipe, use_cache=arguments.get("use_cache", False))
        base, num_steps = Path(arguments["inputs"]["base"]), recipe.training.max_steps
        assert num_steps is not None
        figures = training_figures_of(
            run, base, num_steps, arguments["num_warm_up"], started, age_before=age_before
        )
        return figures | plan_figures(run / "plan.json", figures["step_seconds"])


def training_figures_of(
    run: Path, base: Path, num_steps: int, num_warm_up: int, started: float, *, age_before: float = 0.0
) -> dict[str, Any]:
    """What a run's files say of its first `num_steps`. started: when `train` was called (`time.time`).
    age_before: of the process then, in seconds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step_of(row) for row in rows[:num_steps]]
    load_seconds = (run / "recipe.yaml").stat().st_mtime - started
    return training_figures(
        steps,
        base,
        num_warm_up=num_warm_up,
        load_seconds=load_seconds,
        first_step_seconds=age_before + load_seconds + steps[0].seconds,
    )


def recipe_values(arguments: dict[str, Any], run: Path) -> dict[str, Any]:
    """The case's settings in the words of a recipe."""
    values: dict[str, dict[str, Any]] = {
        "model": {"base": arguments["inputs"]["base"], "compute_dtype": dtype_name(compute_dtype())},
        "lora": {"rank": arguments["rank"], "alpha": 2 * arguments["rank"]},
        "data": {
            "train": arguments["inputs"]["rows"],
            "sequence_length": arguments["sequence_length"],
        },
        "training": {
            "output_dir": str(run),
            "max_steps": arguments["num_warm_up"] + arguments["num_timed"],
            "micro_batch_size": arguments["micro_batch_size"],
            "gradient_accumulation_steps": arguments["accumulation"],
            "optimizer": arguments["optimizer"],
            "lr_schedule": "constant",
            "warmup_ratio": 0.0,
        },
    }
    for section, changes in arguments.get("recipe", {}).items():
        values.setdefault(section, {}).update(changes)
    return values


def step_of(row: dict[str, Any]) -> Step:
    seconds = row["num_tokens"] / row["tokens_per_second"]
    return Step(seconds, row["num_tokens"], row["num_supervised_tokens"], row["loss"])


def plan_figures(file: Path, step_seconds: float) -> dict[str, Any]:
    """What the run planned and what became of it, and, where anything streamed, how fast it was copied: on
    average over the step and as a share of what a copy reaches alone."""
    plan = json.loads(file.read_text())
    figures: dict[str, Any] = {
        "planned_step_device_bytes": plan["step_vram_bytes"],
        "measured_step_device_bytes": plan["measured_step_vram_bytes"],
        "planned_step_seconds": plan["step_seconds"],
        "weights": _counts(plan["weights"]),
        "activations": _counts(plan["activations"]),
        "changes": [change["reason"] for change in plan["changes"]],
    }
    if plan["copied_bytes_per_step"]:
        copied = plan["copied_bytes_per_step"] / step_seconds
        ceiling = plan["rates"]["copy_bytes_per_second"]
        figures |= {"copied_gb_per_second": copied / 1e9, "share_of_copy_ceiling": copied / ceiling}
    return figures


def _counts(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


if __name__ == "__main__":
    answer(measure)
