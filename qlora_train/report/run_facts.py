"""Reads what a run's folder says of the run, as far as it is there and readable."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

from qlora_train.adapter.run_adapter import find_adapter
from qlora_train.device.step_clock import OF_A_STEP, Cause
from qlora_train.errors import RunFolderError
from qlora_train.files.step_rows import step_rows
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.report.chart import Chart, Point, Series, smoothed

WARM_UP_STEPS = 2
_SMOOTHED_SHARE, _LEAST_SPAN = 0.05, 5
_FEWEST_SMOOTHED = 50


@dataclass(frozen=True)
class RunFacts:
    """A run. rows: of metrics.jsonl. plan: plan.json, empty if it does not read. samples: rows of
    samples.jsonl. receipts: by the folder that an export wrote. adapter: the newest adapter's folder."""

    path: Path
    recipe: Recipe
    rows: list[dict[str, Any]]
    plan: Mapping[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    receipts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adapter: Path | None = None

    @staticmethod
    def read(path: Path) -> RunFacts:
        """Raises `RunFolderError` for a folder that holds no run."""
        if not (path / "recipe.yaml").is_file():
            raise RunFolderError(
                f"{path}: not a run folder: recipe.yaml is missing. Give the folder that training wrote."
            )
        return RunFacts(
            path=path,
            recipe=load_recipe(path / "recipe.yaml"),
            rows=step_rows(path / "metrics.jsonl"),
            plan=_object(path / "plan.json"),
            samples=step_rows(path / "samples.jsonl"),
            receipts={
                file.parent.name: receipt
                for file in sorted(path.glob("*/receipt.json"))
                if (receipt := _object(file))
            },
            adapter=_adapter(path),
        )

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "tokens_per_second" in row]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval_loss" in row]

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps of the whole run, where the recipe says."""
        return self.recipe.training.max_steps

    @property
    def last_loss(self) -> float | None:
        return self.steps[-1].get("loss") if self.steps else None

    @property
    def best_evaluation(self) -> tuple[int, float] | None:
        """(step, loss) of the best evaluation."""
        found = [(row["step"], row["eval_loss"]) for row in self.evaluations if row["eval_loss"] is not None]
        return min(found, key=lambda pair: pair[1]) if found else None

    @property
    def median_step_seconds(self) -> float | None:
        """Of the steps after the first, which are metered and warm up."""
        rates = [row for row in self._warm_steps if row["tokens_per_second"]]
        return median(row["num_tokens"] / row["tokens_per_second"] for row in rates) if rates else None

    @property
    def _warm_steps(self) -> list[dict[str, Any]]:
        return [row for row in self.steps if row["step"] > WARM_UP_STEPS]

    def seconds_by_step(self) -> dict[Cause, list[Point]]:
        """(step, seconds) of every cause that steps after the first took time for. Steps of versions that
        measured none are left out."""
        rows = [row for row in self._warm_steps if any(cause.key in row for cause in OF_A_STEP)]
        seen = [cause for cause in OF_A_STEP if any(row.get(cause.key) for row in rows)]
        return {cause: [(row["step"], row.get(cause.key, 0.0)) for row in rows] for cause in seen}

    def mean_seconds(self) -> dict[Cause, float]:
        """Seconds of a step by cause, means of those after the first."""
        return {cause: mean(y for _, y in points) for cause, points in self.seconds_by_step().items()}

    def planned_seconds(self) -> dict[Cause, float]:
        """Seconds of a step by cause, by the plan."""
        of_plan = self.plan.get("seconds_of_a_step", {})
        return {cause: of_plan[cause.key] for cause in OF_A_STEP if of_plan.get(cause.key)}

    def total_seconds(self, cause: Cause) -> float:
        """In all steps and between them."""
        return sum(row.get(cause.key, 0.0) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(row["num_tokens"] for row in self.steps)

    def points(self, key: str) -> list[Point]:
        """(step, value) of a column of metrics.jsonl; what is no number is a gap."""
        rows = self.evaluations if key == "eval_loss" else self.steps
        return [(row["step"], _number(row.get(key))) for row in rows]

    def smoothing_span(self) -> int | None:
        """Steps that a smoothed line averages over; None: of so few steps each is drawn as it is."""
        num_steps = len(self.steps)
        return None if num_steps < _FEWEST_SMOOTHED else max(_LEAST_SPAN, round(_SMOOTHED_SHARE * num_steps))

    def charts(self) -> list[Chart]:
        """Loss, learning rate, gradient norm and speed, by step; those that have values."""
        loss, span = self.points("loss"), self.smoothing_span()
        lines = [
            Series("loss of each step", loss, 0, is_faint=span is not None),
            Series(f"its mean over about {span} steps", smoothed(loss, span) if span else [], 0),
            Series("evaluation loss", self.points("eval_loss"), 1),
        ]
        charts = [
            Chart("Loss", "optimizer step", [line for line in lines if line.points]),
            Chart("Gradient norm", "optimizer step", [Series("norm", self.points("grad_norm"), 2)]),
            Chart("Learning rate", "optimizer step", [Series("rate", self.points("learning_rate"), 3)], True),
            Chart(
                "Tokens per second",
                "optimizer step",
                [Series("speed", self.points("tokens_per_second"), 4)],
                True,
            ),
        ]
        return [chart for chart in charts if not chart.is_empty]

    def planned_bytes(self, phase: str = "step") -> list[tuple[str, int]]:
        """(cause, bytes) on the device in a phase, by the plan, the largest first."""
        rows = self.plan.get("rows", [])
        places = ("VRAM", "tensors in RAM")
        found = [(r["cause"], r["bytes"]) for r in rows if r["phase"] == phase and r["place"] in places]
        return sorted(found, key=lambda pair: -pair[1])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _adapter(run: Path) -> Path | None:
    """The newest adapter: that of the last checkpoint, as the finished one may be that of a shorter run,
    which is going on; else the finished one. None: there is none yet."""
    for checkpoint in ("last", None):
        with contextlib.suppress(RunFolderError):
            return find_adapter(run, checkpoint, lambda line: None)
    return None
