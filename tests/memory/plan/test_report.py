"""What is shown and written: rows add up, JSON is plain and complete, the table names what matters."""

from __future__ import annotations

import io
import json
from collections import defaultdict

import pytest
from rich.console import Console

from qlora_train.device.description import planned_gpu
from qlora_train.memory.execution import ExecutionPlan
from qlora_train.memory.plan.from_recipe import plan_recipe
from qlora_train.memory.plan.plan import duration
from qlora_train.memory.plan.report import print_plan, residency_lines
from qlora_train.recipe import Recipe

GIB = 2**30


def plan_of(base: str, gib: float, **memory: str):  # type: ignore[no-untyped-def]
    recipe = Recipe.from_dict({"model": {"base": base}, "data": {"train": "x"}, "memory": memory})
    return plan_recipe(recipe, planned_gpu(None, None), int(gib * GIB))


def shown(plan, num_steps: int | None = None) -> str:  # type: ignore[no-untyped-def]
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=100), "a card", num_steps)
    return text.getvalue()


def test_json_is_complete_and_adds_up() -> None:
    plan = plan_of("TinyLlama/TinyLlama-1.1B", 24)
    values = json.loads(json.dumps(plan.to_dict(num_steps=7)))
    assert values["fits"] is True and values["seconds_to_the_end"] == 7 * values["step_seconds"]
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
    assert plan.to_dict()["seconds_to_the_end"] is None
    tokens_per_step = 4 * 4 * 2048
    assert values["seconds_per_million_tokens"] * tokens_per_step / 1e6 == pytest.approx(plan.step_seconds)


def test_documents_that_are_not_known_are_said() -> None:
    recipe = Recipe.from_dict({"model": {"base": "meta-llama/Llama-3.1-8B"}, "data": {"train": "x"}})
    known = plan_recipe(recipe, planned_gpu(None, None), 24 * GIB, most_documents=100)
    assert known.to_dict()["most_documents"] == 100 and "grows by" not in shown(known)
    line = "for up to 4 documents in a micro-batch; with more, attention's scratch grows by 2.0 MiB for each"
    assert line in shown(plan_of("meta-llama/Llama-3.1-8B", 24))
    assert known.step_vram_bytes >= plan_of("meta-llama/Llama-3.1-8B", 24).step_vram_bytes


def test_streamed_layers_show_up_as_pinned_ram() -> None:
    plan = plan_of("meta-llama/Llama-3.1-8B", 80, weights="ram")
    pinned = {row.cause: row.num_bytes for row in plan.rows() if row.place == "pinned RAM"}
    assert pinned["packed layers"] > 3 * GIB and pinned["embedding and head"] > 1.9 * GIB


def test_the_table_says_what_matters() -> None:
    text = shown(plan_of("meta-llama/Llama-3.1-8B", 24), num_steps=1000)
    for words in ("8.03B parameters", "packed weights", "CUDA context", "optimizer state", "fits: peak"):
        assert words in text
    assert "to the end (1000 steps)" in text and "per million tokens" not in text
    assert "what each knob would save" in text
    assert "assumed: a card like an RTX 3060" in text and "estimate" not in text


def test_without_a_number_of_steps_there_is_a_time_to_multiply() -> None:
    plan = plan_of("meta-llama/Llama-3.1-8B", 24)
    line = next(line for line in shown(plan).splitlines() if line.startswith("time:"))
    per_million = f"{duration(plan.seconds_per_million_tokens)} per million tokens"
    assert line.endswith(f"per step of 32,768 tokens, {per_million} of training data and epoch")


def test_a_plan_that_does_not_fit_says_so() -> None:
    text = shown(plan_of("meta-llama/Llama-3.1-405B", 2))
    assert "DOES NOT FIT" in text and "too little" in text


def test_runs_of_layers_are_told_together() -> None:
    plan = plan_of("TinyLlama/TinyLlama-1.1B", 24).execution
    assert any("layers 0 to 21: weights resident" in line for line in residency_lines(plan))
    mixed = plan_of("meta-llama/Llama-3.1-8B", 3.5).execution
    assert all(len(line) < 200 for line in residency_lines(mixed)) and len(residency_lines(mixed)) < 12
