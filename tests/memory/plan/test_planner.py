"""The planner's choices: the order of preference, hard budgets, explicit keys, refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_train.device.description import CPU, DeviceDescription, planned_gpu
from qlora_train.errors import UserError
from qlora_train.memory.execution import Activation, Place
from qlora_train.memory.plan.byte_walk import step_peak
from qlora_train.memory.plan.from_recipe import Card, find_card, plan_recipe
from qlora_train.memory.plan.host_bytes import HostBudget, host_bytes
from qlora_train.memory.plan.model_shape import KNOWN, shape_from_config
from qlora_train.memory.plan.plan import CONTEXT_BYTES, Choices, Plan
from qlora_train.memory.plan.planner import make_plan
from qlora_train.memory.plan.time_model import Rates, stated_rates, step_time
from qlora_train.memory.plan.workload import _targets, workload_of
from qlora_train.recipe import Recipe

GIB = 2**30
AMPLE = HostBudget(512 * GIB, 2048 * GIB)
GPU = planned_gpu("NVIDIA GeForce RTX 4090", (8, 9))
RATES = Rates(flops=100e12, memory=900e9, copy=20e9, disk=2e9, source="for tests")


def recipe(base: str = "meta-llama/Llama-3.1-8B", **sections: dict[str, Any]) -> Recipe:
    values = {"model": {"base": base}, "data": {"train": "x.jsonl", "sequence_length": 2048}}
    values["training"] = {"micro_batch_size": 1, "gradient_accumulation_steps": 4}
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return Recipe.from_dict(values)


def planned(
    gib: float,
    base: str = "meta-llama/Llama-3.1-8B",
    host: HostBudget = AMPLE,
    rates: Rates = RATES,
    target: DeviceDescription = GPU,
    **sections: dict[str, Any],
) -> Plan:
    asked = recipe(base, **sections)
    shape = KNOWN[base.rpartition("/")[2].lower()]
    workload = workload_of(asked, shape, target)
    choices = Choices(asked.memory.weights, asked.memory.activations)
    return make_plan(workload, int(gib * GIB), rates, host, choices)


def test_with_memory_to_spare_everything_is_resident_and_kept() -> None:
    plan = planned(80)
    assert set(plan.execution.weights) == {Place.RESIDENT}
    assert set(plan.execution.activations) == {Activation.KEEP}
    assert (plan.execution.embedding, plan.execution.head) == (Place.RESIDENT, Place.RESIDENT)
    assert plan.fits and not plan.problems


@pytest.mark.parametrize("gib", [2.5, 3, 4, 6, 8, 10, 12, 16, 20, 24, 40, 80])
def test_a_budget_is_never_exceeded(gib: float) -> None:
    plan = planned(gib)
    assert plan.fits
    assert plan.peak_vram_bytes <= gib * GIB
    assert plan.peak_vram_bytes >= sum(step_peak(plan.workload, plan.execution).values())


def test_less_memory_never_makes_it_faster() -> None:
    seconds = [planned(gib).step_seconds for gib in (80, 40, 24, 16, 12, 8, 6, 4, 3, 2.5)]
    assert all(less > 0.98 * more for more, less in zip(seconds, seconds[1:], strict=False)), seconds


def test_recomputation_comes_before_streaming() -> None:
    plan = planned(12, rates=replace(RATES, flops=200e12, copy=5e9))
    assert set(plan.execution.weights) == {Place.RESIDENT}
    assert Activation.RECOMPUTE in plan.execution.activations


def test_the_first_layers_are_not_kept_and_no_more_than_needed() -> None:
    plan = planned(16)
    kept = [policy is Activation.KEEP for policy in plan.execution.activations]
    assert any(kept) and kept == sorted(kept)
    number = kept.index(True)
    one_more = list(plan.execution.activations)
    one_more[number - 1] = Activation.KEEP
    too_much = replace(plan.execution, activations=tuple(one_more), hold_unpacked=False)
    assert sum(step_peak(plan.workload, too_much).values()) + plan.context_bytes > 0.97 * 16 * GIB


def test_offloading_is_taken_where_copies_are_cheap() -> None:
    fast_bus = replace(RATES, flops=10e12, copy=60e9)
    assert Activation.OFFLOAD in planned(12, rates=fast_bus).execution.activations


def test_as_few_layers_as_fit_stream_and_residents_are_spread() -> None:
    plan = planned(5)
    counts = Counter(plan.execution.weights)
    assert 0 < counts[Place.RAM] < 32
    resident = [i for i, place in enumerate(plan.execution.weights) if place is Place.RESIDENT]
    gaps = {b - a for a, b in zip(resident, resident[1:], strict=False)}
    assert len(gaps) <= 2 and max(gaps, default=0) - min(gaps, default=0) <= 1
    assert plan.execution.num_slots >= 2


def test_seventy_billion_parameters_on_eight_gibibytes() -> None:
    plan = planned(8, "meta-llama/Llama-3.1-70B")
    assert plan.fits and plan.execution.weights.count(Place.RAM) > 70
    assert 30 * GIB < host_bytes(plan.workload, plan.execution)["pinned: packed layers"] < 33 * GIB


def test_what_ram_does_not_hold_streams_from_disk() -> None:
    plan = planned(8, "meta-llama/Llama-3.1-70B", HostBudget(16 * GIB, 100 * GIB))
    assert plan.fits and Place.RAM not in plan.execution.weights and Place.DISK in plan.execution.weights
    refused = planned(8, "meta-llama/Llama-3.1-70B", HostBudget(16 * GIB, 10 * GIB))
    assert not refused.fits and any(problem.startswith("disk:") for problem in refused.problems)


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_an_explicit_place_is_obeyed_although_the_device_has_room(place: str) -> None:
    plan = planned(80, memory={"weights": place})
    assert {*plan.execution.weights, plan.execution.embedding, plan.execution.head} == {Place(place)}


def test_explicit_ram_that_is_not_there_is_refused() -> None:
    plan = planned(80, host=HostBudget(4 * GIB, 100 * GIB), memory={"weights": "ram"})
    assert any(problem.startswith("RAM:") for problem in plan.problems)
    assert "memory.weights=auto memory.activations=auto" in plan.advice


@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
def test_an_explicit_policy_is_obeyed(policy: str) -> None:
    plan = planned(24, memory={"activations": policy})
    assert set(plan.execution.activations) == {Activation(policy)}
    assert plan.fits


def test_explicit_residents_never_stream() -> None:
    plan = planned(5, memory={"weights": "resident"})
    assert set(plan.execution.weights) == {Place.RESIDENT}
    assert not plan.fits or plan.peak_vram_bytes <= 5 * GIB


def test_below_the_floor_it_is_refused_with_the_floor_and_what_would_fit() -> None:
    plan = planned(2, data={"sequence_length": 16384})
    assert not plan.fits
    floor = plan.peak_vram_bytes
    assert planned(floor / GIB / 0.97, data={"sequence_length": 16384}).fits
    with pytest.raises(UserError, match="the floor is made of") as caught:
        plan.require_fit()
    assert "2.00 GiB" in str(caught.value) and caught.value.exit_code == 2
    for change in plan.advice:
        assert change.split("=")[0] in ("training.micro_batch_size", "data.sequence_length", "lora.rank")


def test_fewer_rows_have_fewer_documents() -> None:
    """What is advised is judged with the documents that it leaves."""
    asked = recipe(training={"micro_batch_size": 16, "gradient_accumulation_steps": 1})
    workload = workload_of(asked, KNOWN["llama-3.1-8b"], GPU, most_documents=1000)
    plan = make_plan(workload, 4 * GIB, RATES, AMPLE)
    assert not plan.fits
    assert "training.micro_batch_size=1 (and more accumulation)" in plan.advice
    one = workload_of(recipe(), KNOWN["llama-3.1-8b"], GPU, most_documents=63)
    assert make_plan(replace(one, num_micro_batches=1), 4 * GIB, RATES, AMPLE).fits


def test_long_contexts_are_cut_into_mlp_tiles() -> None:
    plan = planned(6, data={"sequence_length": 32768}, training={"gradient_accumulation_steps": 1})
    assert plan.fits and plan.execution.mlp_tile_tokens is not None


def test_on_a_cpu_what_does_not_fit_streams_from_disk() -> None:
    host = HostBudget(8 * GIB, 100 * GIB)
    plan = planned(4, host=host, rates=stated_rates(CPU), target=CPU, model={"compute_dtype": "bfloat16"})
    assert plan.fits and Place.RAM not in plan.execution.weights and Place.DISK in plan.execution.weights
    assert plan.execution.inputs is Place.RESIDENT
    assert plan.peak_ram_bytes > plan.peak_vram_bytes


def test_savings_of_the_knobs_are_real() -> None:
    plan = planned(24)
    assert any(line.startswith("memory.activations=recompute: saves") for line in plan.advice)


def test_streaming_hides_behind_arithmetic_in_large_groups() -> None:
    """T* = 0.172 F / BW tokens: above it streaming costs next to nothing, below it copies decide."""
    plan = planned(80, memory={"weights": "ram", "activations": "recompute"}).execution
    plan = replace(plan, num_groups=1, hold_unpacked=False)
    for tokens, hidden in ((16 * 1024, True), (128, False)):
        asked = recipe(data={"sequence_length": tokens}, training={"gradient_accumulation_steps": 1})
        workload = workload_of(asked, KNOWN["llama-3.1-8b"], GPU)
        time = step_time(workload, plan, RATES)
        assert (time.total_seconds < 1.1 * time.compute_seconds) == hidden
        assert (time.copy_seconds > time.compute_seconds) != hidden


def test_flops_per_token_and_parameter() -> None:
    """4 keeping everything, 5.46 recomputing without the last product (Llama's proportions)."""
    workload = workload_of(recipe(lora={"rank": 1}, data={"sequence_length": 16}), KNOWN["llama-3.1-8b"], GPU)
    kept = planned(80).execution
    recomputed = replace(kept, activations=(Activation.RECOMPUTE,) * 32)
    work = workload.num_tokens * workload.num_micro_batches * 32 * workload.shape.layer_parameters
    head = 4 * workload.num_supervised * workload.num_micro_batches * workload.shape.matrix_parameters
    assert (step_time(workload, kept, RATES).flops - head) / work == pytest.approx(4, rel=0.01)
    assert (step_time(workload, recomputed, RATES).flops - head) / work == pytest.approx(5.46, rel=0.01)


def test_a_recipe_becomes_a_plan_for_a_device() -> None:
    asked = recipe("meta-llama/Llama-3.2-1B", memory={"vram": "6 GiB"})
    plan = plan_recipe(asked, replace(GPU, name="NVIDIA GeForce RTX 4090"), 80 * GIB)
    assert plan.budget_bytes == 6 * GIB and "RTX 4090" in plan.rates.source
    free = plan_recipe(recipe("meta-llama/Llama-3.2-1B"), GPU, 10 * GIB)
    assert free.budget_bytes == int(9.5 * GIB)
    with_context = plan_recipe(recipe("meta-llama/Llama-3.2-1B"), GPU, 10 * GIB, has_context=True)
    assert with_context.budget_bytes == free.budget_bytes + CONTEXT_BYTES


@pytest.mark.parametrize(
    ("answer", "code", "expected"),
    [
        ("NVIDIA GeForce RTX 4090, 23028, 8.9", 0, Card("NVIDIA GeForce RTX 4090", 23028 * 2**20, (8, 9))),
        ("NVIDIA-SMI has failed because it could not communicate with the driver", 9, None),
        ("No devices were found", 0, None),
        ("", 0, None),
    ],
)
def test_the_drivers_tool_is_asked(
    answer: str, code: int, expected: Card | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_card() == expected


def test_without_the_tool_there_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_card() is None


def test_unknown_names_of_linears_are_refused_only_where_the_family_is_known() -> None:
    config = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"vocab_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 256}
    unknown = shape_from_config(config | {"model_type": "llama9"}, "here")
    assert not unknown.is_known
    assert _targets(["c_fc"], unknown) == tuple(unknown.linear_shapes())  # counted as all of them
    assert _targets(["q_proj"], unknown) == ("self_attn.q_proj",)
    starcoder = shape_from_config(config | {"model_type": "starcoder2"}, "here")
    assert starcoder.is_exact and _targets(["c_fc"], starcoder) == ("mlp.c_fc",)
    with pytest.raises(UserError, match="c_fc matches no linear layer"):
        _targets(["c_fc"], shape_from_config(config | {"model_type": "llama"}, "here"))
