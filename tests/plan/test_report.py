"""What is shown and written: rows add up, JSON is plain and complete, a few lines say what matters."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from qlora_train.device.description import planned_gpu
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.plan import Plan
from qlora_train.plan.report import print_plan, residency_lines
from qlora_train.plan.request import request_of
from qlora_train.plan.words import duration
from qlora_train.recipe import Recipe
from qlora_train.weights.execution_plan import ExecutionPlan

GIB = 2**30
RECIPE = {"model": {"base": "meta-llama/Llama-3.1-8B"}, "data": {"train": "x"}}
RECIPE["training"] = {"micro_batch_size": 4, "gradient_accumulation_steps": 4}


def plan_of(base: str, gib: float, most: Callable[[int], int] = lambda size: 0, **memory: str) -> Plan:
    recipe = Recipe.from_dict(RECIPE | {"model": {"base": base}, "memory": memory})
    return plan_recipe(recipe, planned_gpu(None, None), int(gib * GIB), most_documents=most)


def shown(plan: Plan, num_steps: int | None = None, *, details: bool = False) -> list[str]:
    text = io.StringIO()
    request = request_of(Recipe.from_dict(RECIPE), "RTX 3060 8GB", 64 * GIB, 200 * GIB)
    values = json.loads(json.dumps(plan.to_dict() | {"advice": plan.advice}))
    print_plan(values, request, Console(file=text, width=120), num_steps, details=details)
    return text.getvalue().splitlines()


def test_json_is_complete_and_adds_up() -> None:
    plan = plan_of("TinyLlama/TinyLlama-1.1B", 24)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["fits"] is True
    assert ExecutionPlan.from_dict(values["execution"]) == plan.execution
    assert values["weights"] == ["resident"] * 22 and len(values["activations"]) == 22
    on_device: dict[str, int] = defaultdict(int)
    for row in values["rows"]:
        assert row["bytes"] > 0
        if row["place"] == "VRAM":
            on_device[row["phase"]] += row["bytes"]
    assert max(on_device.values()) == values["peak_vram_bytes"]
    assert {row["phase"] for row in values["rows"]} == {
        "load", "step", "evaluation", "generate", "save", "merge"
    }  # fmt: skip
    assert {row["place"] for row in values["rows"]} == {"VRAM", "RAM", "disk"}
    assert (values["micro_batch_size"], values["num_micro_batches"]) == (4, 4)
    tokens_per_step = 4 * 4 * 2048
    assert values["seconds_per_million_tokens"] * tokens_per_step / 1e6 == pytest.approx(plan.step_seconds)


def test_an_evaluation_takes_the_forward_half() -> None:
    """Two of four FLOPs per token and parameter, where nothing is computed again."""
    plan = plan_of("TinyLlama/TinyLlama-1.1B", 24, activations="keep")
    assert 0.3 < plan.evaluation_seconds_per_million_tokens / plan.seconds_per_million_tokens < 0.55


def test_documents_that_are_not_known_are_said() -> None:
    known = plan_of("meta-llama/Llama-3.1-8B", 24, lambda size: 25 * size)
    assert known.to_dict()["most_documents"] == 100 and not known.remarks
    plan = plan_of("meta-llama/Llama-3.1-8B", 24)
    line = "for up to 4 documents in a micro-batch; with more, attention's scratch grows by 2.0 MiB for each"
    assert line in shown(plan)
    assert known.step_vram_bytes >= plan.step_vram_bytes


def test_streamed_layers_show_up_as_pinned_ram() -> None:
    plan = plan_of("meta-llama/Llama-3.1-8B", 80, weights="ram")
    pinned = {row.cause: row.num_bytes for row in plan.entries() if row.place == "pinned RAM"}
    assert pinned["quantized layers"] > 3 * GIB and pinned["embedding and head"] > 1.9 * GIB


def test_the_verdict_comes_first_and_fifteen_lines_are_enough() -> None:
    plan = plan_of("meta-llama/Llama-3.1-8B", 24)
    lines = shown(plan, num_steps=1000)
    assert lines[0].startswith(f"fits: {plan.peak_vram_bytes / GIB:.2f} GiB of 22.80 GiB VRAM, ")
    assert "to the end (1000 steps)" in lines[1] and "evaluation takes" in lines[1]
    assert len(lines) <= 15
    text = "\n".join(lines)
    for words in (
        "8.03B parameters",
        "32 layers, nf4",
        "RTX 3060 8GB with 8 GiB",
        "largest on the device",
        "layers 0",
    ):
        assert words in text


def test_without_a_number_of_steps_there_is_a_time_to_multiply() -> None:
    plan = plan_of("meta-llama/Llama-3.1-8B", 24)
    line = next(line for line in shown(plan) if line.startswith("time:"))
    per_million = f"{duration(plan.seconds_per_million_tokens)} per million tokens"
    assert (
        f"per step of 32,768 tokens (4 micro-batches of 4), {per_million} of training data and epoch" in line
    )


def test_details_are_one_table_with_phases_as_columns() -> None:
    plan = plan_of("meta-llama/Llama-3.1-8B", 6)
    lines = shown(plan, details=True)
    header = next(line for line in lines if line.startswith("place"))
    assert header.split() == ["place", "cause", "load", "step", "evaluation", "generate", "save", "merge"]
    (total,) = (line for line in lines if line.startswith("VRAM") and " total " in line)
    step_bytes = plan.step_vram_bytes + plan.context_bytes
    assert total.split()[3] == f"{step_bytes / GIB:.3f}"
    assert lines[: lines.index(header) - 1] == shown(plan)


def test_a_plan_that_does_not_fit_says_so() -> None:
    plan = plan_of("meta-llama/Llama-3.1-405B", 2)
    assert shown(plan)[0].startswith("DOES NOT FIT: ") and "too little" in plan.problems[0]


def test_runs_of_layers_are_told_together() -> None:
    plan = plan_of("TinyLlama/TinyLlama-1.1B", 24).execution
    assert residency_lines(plan)[0] == "weights: layers 0 to 21 resident; embedding resident, head resident"
    mixed: Any = plan_of("meta-llama/Llama-3.1-8B", 3.5).execution
    assert all(len(line) < 200 for line in residency_lines(mixed)) and len(residency_lines(mixed)) == 2
