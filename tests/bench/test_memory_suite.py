"""The memory cases: what they ask fits by the plan; the work behind them, with a tiny shape on the CPU."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qlora_train.bench.command import TABLE_WIDTH
from qlora_train.bench.gpu_suite import Part, Suite, failures
from qlora_train.bench.memory_suite import CASES, COLUMNS, NUM_RUNS, config_of, memory_case, remarks
from qlora_train.bench.pieces import memory
from qlora_train.bench.table import Row, build_table
from qlora_train.device.description import planned_gpu
from qlora_train.errors import UserError
from qlora_train.memory.execution import Place
from qlora_train.memory.plan.host_bytes import HostBudget
from qlora_train.memory.plan.model_shape import KNOWN, shape_from_config
from qlora_train.memory.plan.plan import Choices, Plan
from qlora_train.memory.plan.planner import make_plan
from qlora_train.memory.plan.time_model import stated_rates
from qlora_train.memory.plan.workload import workload_of
from qlora_train.recipe import Recipe

GIB = 2**30
BY_NAME = {case.name: case for case in CASES}
TINY = config_of(KNOWN["llama-3.1-8b"]) | {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 401,
}
RECIPE = {
    "data": {"sequence_length": 61},
    "training": {"micro_batch_size": 2, "gradient_accumulation_steps": 3},
}


def arguments(work: str, memory_section: dict[str, Any], **training: Any) -> dict[str, Any]:
    """Of the piece, as a case gives them."""
    recipe = {**RECIPE, "memory": memory_section, "training": {**RECIPE["training"], **training}}
    case = memory_case("tiny", "about", "tiny", TINY, recipe, work=work, num_steps=2)
    return {**case.settings, **case.contenders[0].arguments}


def planned(name: str, gib: float) -> Plan:
    """By the arguments of a case's first contender, on a large machine with an H100."""
    case = BY_NAME[name]
    sections = case.contenders[0].arguments["recipe"]
    recipe = Recipe.from_dict(
        {"model": {"base": "x"}, **sections, "data": {"train": "x", **sections["data"]}}
    )
    workload = workload_of(recipe, shape_from_config(case.settings["config"]), planned_gpu("H100", (9, 0)))
    host = HostBudget(100 * GIB, 60 * GIB)
    choices = Choices(recipe.memory.weights, recipe.memory.activations)
    budget_bytes = recipe.memory.vram_bytes or int(gib * GIB)
    return make_plan(workload, budget_bytes, stated_rates(planned_gpu("H100", None)), host, choices)


@pytest.mark.parametrize(
    ("name", "gib", "num_tokens"), [("memory-8b-4gib", 4, 2048), ("memory-70b-8gib", 8, 2048)]
)
def test_what_is_asked_for_fits_and_streams_from_ram(name: str, gib: float, num_tokens: int) -> None:
    plan = planned(name, 80)
    assert plan.fits and plan.budget_bytes == gib * GIB
    assert plan.workload.num_tokens * plan.workload.num_micro_batches == num_tokens
    assert Place.RAM in plan.execution.weights and Place.DISK not in plan.execution.weights


def test_the_streamed_case_has_a_resident_plan_of_8192_tokens_a_group() -> None:
    plan = planned("memory-streamed", 75)
    assert plan.fits and not plan.execution.streams and plan.execution.num_groups == 1
    assert plan.workload.num_tokens * plan.workload.num_micro_batches == 8192


def test_every_case_can_be_one_stage_and_shares_its_base() -> None:
    assert len(BY_NAME) == len(CASES) and set(NUM_RUNS) <= set(BY_NAME)
    configs: dict[str, Any] = {}
    for case in CASES:
        assert case.needs_cuda and case.timeout_seconds < 570
        assert configs.setdefault(case.settings["base"], case.settings["config"]) == case.settings["config"]


@pytest.fixture(scope="module")
def resident() -> dict[str, Any]:
    return memory.measure(arguments("budget", {"vram": "4GiB"}))


def test_a_budget_is_planned_metered_and_timed(resident: dict[str, Any]) -> None:
    assert resident["held"] and resident["changes"] == []
    assert resident["budget_bytes"] == 4 * GIB
    assert 0.95 < resident["peak_over_planned"] < 1.02
    assert resident["device_peak_bytes"] < resident["planned_step_bytes"] * 1.02
    assert resident["read_bytes_per_step"] == 0
    num_tokens = 2 * 61 * 3
    assert resident["tokens_per_second"] == pytest.approx(num_tokens / resident["step_seconds"])
    assert abs(resident["loss"] - 6.5) < 0.7  # ln 401 + 1/2


def test_from_a_file_it_is_the_same_training(resident: dict[str, Any]) -> None:
    streamed = memory.measure(arguments("budget", {"vram": "4GiB", "weights": "disk"}))
    assert streamed["masters_hash"] == resident["masters_hash"]
    assert 0.95 < streamed["peak_over_planned"] < 1.02
    assert 0 < streamed["read_bytes_per_step"] <= streamed["planned_copied_bytes_per_step"]
    assert any("from disk" in line for line in streamed["residency"])


def test_another_seed_is_another_training(resident: dict[str, Any]) -> None:
    assert (
        memory.measure(arguments("budget", {"vram": "4GiB"}, seed=1))["masters_hash"]
        != (resident["masters_hash"])
    )


def test_streamed_beside_resident_has_the_same_gradient() -> None:
    figures = memory.measure(arguments("streamed", {"weights": "resident", "activations": "recompute"}))
    assert figures["same_loss"] and figures["gradient_difference"] == 0
    assert figures["tokens_per_group"] == 2 * 61 * 3
    assert len(figures["resident_seconds"]) == len(figures["streamed_seconds"]) == 2
    assert figures["streamed_over_resident"] == pytest.approx(
        figures["resident_step_seconds"] / figures["step_seconds"]
    )
    assert figures["read_bytes_per_step"] > 0
    assert any("from RAM" in line for line in figures["residency"])


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="this does not fit"):
        memory.measure(arguments("budget", {"vram": "1MiB"}))


def test_the_suite_runs_them_in_processes_of_their_own_and_shows_them(tmp_path: Path) -> None:
    """`deterministic: true` reaches torch there before anything else does."""
    recipe = {**RECIPE, "training": {**RECIPE["training"], "deterministic": True}}
    options: dict[str, Any] = {"needs_cuda": False, "num_steps": 2}
    cases = (
        memory_case("base", "about", "tiny", TINY, RECIPE, work="base", **options),
        memory_case("budget", "about", "tiny", TINY, recipe, target="held", **options),
    )
    part = Part("memory", cases, COLUMNS)
    machine = {"gpu": None, "versions": {"torch": "any"}}
    suite = Suite(tmp_path / "records", lambda name: tmp_path / name, machine, lambda line: None)
    assert suite.run(part) == 0
    made, stepped = suite.rows(part)
    assert made.runs[0]["base_bytes"] > 0 and not made.runs[0]["was_there"]
    figures = stepped.runs[0]
    assert figures["is_deterministic"] and figures["process_peak_bytes"] > figures["device_peak_bytes"]
    assert stepped.word == "held" and failures([made, stepped]) == []
    screen = io.StringIO()
    table = build_table([made, stepped], part.columns, {"budget": "held"})
    Console(file=screen, width=TABLE_WIDTH).print(table)
    for heading in ("planned", "allocated", "of the plan", "tokens/s", "made in"):
        assert heading in screen.getvalue()


def test_remarks_say_what_numbers_do_not() -> None:
    def row(*runs: dict[str, Any]) -> str:
        return remarks(Row("case", "ours", runs))

    assert row({"held": True, "masters_hash": "a"}) == "held"
    assert row({"held": False, "changes": ["step 1: less"]}) == "NOT HELD: step 1: less"
    assert row({"masters_hash": "a"}, {"masters_hash": "a"}) == "the same bytes in every run"
    assert row({"masters_hash": "a"}, {"masters_hash": "b"}) == "bytes differ between runs"
    assert row({"pinned": False, "gradient_difference": 0.25}) == "not pinned; gradients differ by 2.5e-01"


def test_random_batches_are_full_rows_of_whole_documents() -> None:
    values = {"model": {"base": "x"}, **RECIPE, "data": {"train": "x", **RECIPE["data"]}}
    batches = memory.random_batches(Recipe.from_dict(values), 401, torch.device("cpu"))
    assert len(batches) == 3
    for tokens in batches:
        assert tokens.documents.boundaries == (0, 61, 122)
        assert len(tokens.supervised) == 2 * 60
        assert torch.equal(tokens.label_ids.device, tokens.ids.device[tokens.supervised + 1])
        assert torch.equal(tokens.position_ids[0, 61:], torch.arange(61))
    assert not torch.equal(batches[0].ids.device, batches[1].ids.device)
