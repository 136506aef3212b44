"""The planner's choices: the order of preference, hard budgets, explicit keys, refusals."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from qlora_train.device.description import CPU, DeviceDescription, planned_gpu
from qlora_train.errors import UserError
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.host_budget import HostBudget, Machine
from qlora_train.plan.host_bytes import HEAP_SHARE, LAYER_BUFFERS, MATRICES, PROCESS, ROWS_BYTES, host_bytes
from qlora_train.plan.model_shape import _shape_of, known_shape
from qlora_train.plan.plan import Choices, Plan
from qlora_train.plan.planned_model import planned_model
from qlora_train.plan.planned_walk import MOST_TOGETHER, step_bytes
from qlora_train.plan.planner import make_plan
from qlora_train.plan.step_sum import _loss_bytes, layer_bytes, peak_by_sum
from qlora_train.plan.time_model import Rates, stated_rates, step_time
from qlora_train.plan.workload import workload_of
from qlora_train.recipe import Recipe
from qlora_train.weights.execution_plan import ActivationPolicy, Placement

GIB = 2**30
AMPLE = HostBudget(512 * GIB, 2048 * GIB)
GPU = planned_gpu("NVIDIA GeForce RTX 4090", (8, 9))
RATES = Rates(
    flops=100e12,
    attention=50e12,
    long_attention=50e12,
    elementwise=900e9,
    expert_product_seconds=2e-5,
    memory=900e9,
    copy=20e9,
    disk=2e9,
    source="for tests",
)


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
    shape = known_shape(base.rpartition("/")[2].lower())
    workload = workload_of(asked, shape, target)
    choices = Choices(asked.memory.weights, asked.memory.activations)
    return make_plan(workload, int(gib * GIB), rates, host, choices)


def test_with_memory_to_spare_everything_is_resident_and_kept() -> None:
    plan = planned(80)
    assert set(plan.execution.weights) == {Placement.DEVICE}
    assert set(plan.execution.activations) == {ActivationPolicy.KEEP}
    assert (plan.execution.embedding, plan.execution.head) == (Placement.DEVICE, Placement.DEVICE)
    assert plan.fits and not plan.problems


@pytest.mark.parametrize("gib", [2.5, 3, 4, 6, 8, 10, 12, 16, 20, 24, 40, 80])
def test_a_budget_is_never_exceeded(gib: float) -> None:
    plan = planned(gib)
    assert plan.fits
    assert plan.peak_vram_bytes <= gib * GIB
    assert plan.peak_vram_bytes >= sum(step_bytes(plan.workload, plan.execution).device.values())


def test_less_memory_never_makes_it_faster() -> None:
    seconds = [planned(gib).step_seconds for gib in (80, 40, 24, 16, 12, 8, 6, 4, 3, 2.5)]
    assert all(less > 0.98 * more for more, less in zip(seconds, seconds[1:], strict=False)), seconds


def test_recomputation_comes_before_streaming() -> None:
    plan = planned(12, rates=replace(RATES, flops=200e12, copy=1e9))
    assert set(plan.execution.weights) == {Placement.DEVICE}
    assert ActivationPolicy.RECOMPUTE in plan.execution.activations


def test_the_first_layers_are_not_kept_and_no_more_than_needed() -> None:
    plan = planned(16)
    kept = [policy is ActivationPolicy.KEEP for policy in plan.execution.activations]
    assert any(kept) and kept == sorted(kept)
    number = kept.index(True)
    one_more = list(plan.execution.activations)
    one_more[number - 1] = ActivationPolicy.KEEP
    too_much = replace(plan.execution, activations=tuple(one_more), hold_dequantized=False)
    assert sum(step_bytes(plan.workload, too_much).device.values()) + plan.context_bytes > 0.97 * 16 * GIB


def test_offloading_is_taken_where_copies_are_cheap() -> None:
    fast_bus = replace(RATES, flops=10e12, copy=60e9)
    assert ActivationPolicy.OFFLOAD in planned(12, rates=fast_bus).execution.activations


def test_the_embedding_leaves_where_its_room_keeps_layers() -> None:
    """Against every plan with the embedding resident that fits, and against any with another number kept."""
    plan = planned(8, data={"sequence_length": 1024})
    chosen = plan.execution
    assert (chosen.embedding, chosen.head) == (Placement.RAM, Placement.DEVICE)
    assert set(chosen.weights) == {Placement.DEVICE}
    num_kept = chosen.activations.count(ActivationPolicy.KEEP)
    assert 0 < num_kept < chosen.num_layers

    def seconds_with(
        place: Placement, groups: int, holds: bool, policy: ActivationPolicy, kept: int
    ) -> float | None:
        policies = (policy,) * (32 - kept) + (ActivationPolicy.KEEP,) * kept
        other = replace(
            chosen, embedding=place, num_groups=groups, hold_dequantized=holds, activations=policies
        )
        peak = peak_by_sum(plan.workload, other) * 1.02 + plan.context_bytes
        return step_time(plan.workload, other, RATES).total_seconds if peak <= 8 * GIB else None

    ways = product(
        (1, 2, 4), (False, True), (ActivationPolicy.RECOMPUTE, ActivationPolicy.OFFLOAD), range(33)
    )
    with_resident = [seconds_with(Placement.DEVICE, *way) for way in ways]
    fastest = min(seconds for seconds in with_resident if seconds is not None)
    assert plan.step_seconds < 0.97 * fastest
    way = chosen.num_groups, chosen.hold_dequantized, chosen.activations[0]
    assert seconds_with(Placement.RAM, *way, num_kept + 1) is None


def test_rows_of_an_embedding_in_ram_are_copied_once_per_token() -> None:
    plan = planned(80)
    away = replace(plan.execution, embedding=Placement.RAM)
    time = step_time(plan.workload, away, RATES)
    assert time.copied_bytes == plan.workload.tokens_per_step * 4096 * 2
    assert time.total_seconds == pytest.approx(plan.step_seconds + time.copied_bytes / RATES.copy)


def test_of_equally_fast_plans_the_one_with_the_least_elsewhere_is_taken() -> None:
    """Offloading two layers or ten takes the same time where copies hide behind arithmetic."""
    rates = replace(RATES, copy=200e9)
    plan = planned(20, rates=rates)
    offloaded = [policy is ActivationPolicy.OFFLOAD for policy in plan.execution.activations]
    assert any(offloaded) and set(plan.execution.weights) == {Placement.DEVICE}
    room = (20 * GIB - plan.context_bytes) * 0.98
    for place, number in product((Placement.DEVICE, Placement.RAM), range(33)):
        policies = (ActivationPolicy.OFFLOAD,) * number + (ActivationPolicy.KEEP,) * (32 - number)
        other = replace(plan.execution, embedding=place, activations=policies)
        elsewhere = sum(host_bytes(plan.workload, other).values())
        if elsewhere < sum(plan.host.values()) - 2**20:
            seconds = step_time(plan.workload, other, rates).total_seconds
            assert peak_by_sum(plan.workload, other) > 0.97 * room or seconds > plan.step_seconds


@pytest.mark.parametrize(
    ("base", "card", "micro_batches"),
    [
        ("llama-3.1-8b", "RTX 4090", (1, 16)),
        ("llama-3.1-8b", "RTX 4090", (4, 4)),
        ("llama-3.1-8b", "RTX 3060", (1, 4)),
        ("qwen2.5-14b", "RTX 4090", (1, 8)),
    ],
)
def test_more_memory_never_puts_more_elsewhere(base: str, card: str, micro_batches: tuple[int, int]) -> None:
    """Neither layers nor bytes, unless the step is faster; no matrix, unless fewer bytes are elsewhere."""
    training = dict(zip(("micro_batch_size", "gradient_accumulation_steps"), micro_batches, strict=True))
    gpu = planned_gpu(card, None)
    shape = known_shape(base)
    assert shape is not None
    workload = workload_of(recipe(training=training), shape, gpu)
    host = HostBudget(64 * GIB, 2048 * GIB)
    plans = [make_plan(workload, gib * GIB, stated_rates(gpu), host) for gib in (6, 8, 12, 16, 24)]
    assert all(plan.fits for plan in plans)
    for less, more in zip(plans, plans[1:], strict=False):
        assert more.step_seconds < 1.021 * less.step_seconds
        is_faster = more.step_seconds < 0.98 * less.step_seconds
        resident = [plan.execution.weights.count(Placement.DEVICE) for plan in (less, more)]
        assert is_faster or resident[1] >= resident[0]
        fewer_bytes = sum(more.host.values()) < 0.98 * sum(less.host.values())
        for matrix in ("embedding", "head"):
            if getattr(less.execution, matrix) is Placement.DEVICE and not (is_faster or fewer_bytes):
                assert getattr(more.execution, matrix) is Placement.DEVICE
        assert is_faster or sum(more.host.values()) <= 1.02 * sum(less.host.values())


def test_all_of_the_device_is_used_before_ram() -> None:
    """What waits in RAM, one layer of it less would not fit."""
    plan = planned(16)
    assert sum(plan.host.values()) > 2 * GIB  # else nothing is to be seen
    assert plan.peak_vram_bytes > 0.95 * 16 * GIB


def test_a_tied_embedding_stays_with_the_head() -> None:
    for gib in (3, 4, 5):
        plan = planned(gib, "meta-llama/Llama-3.2-3B")
        assert plan.execution.embedding is plan.execution.head


def test_as_few_layers_as_fit_stream_and_residents_are_spread() -> None:
    plan = planned(5)
    counts = Counter(plan.execution.weights)
    assert 0 < counts[Placement.RAM] < 32
    resident = [i for i, place in enumerate(plan.execution.weights) if place is Placement.DEVICE]
    gaps = {b - a for a, b in zip(resident, resident[1:], strict=False)}
    assert len(gaps) <= 2 and max(gaps, default=0) - min(gaps, default=0) <= 1
    assert plan.execution.num_slots >= 2


def test_seventy_billion_parameters_on_eight_gibibytes() -> None:
    plan = planned(8, "meta-llama/Llama-3.1-70B")
    assert plan.fits and plan.execution.weights.count(Placement.RAM) > 70
    assert 30 * GIB < host_bytes(plan.workload, plan.execution)["pinned: quantized layers"] < 33 * GIB


def test_what_ram_does_not_hold_streams_from_disk() -> None:
    plan = planned(8, "meta-llama/Llama-3.1-70B", HostBudget(16 * GIB, 100 * GIB))
    assert (
        plan.fits and Placement.RAM not in plan.execution.weights and Placement.DISK in plan.execution.weights
    )
    refused = planned(8, "meta-llama/Llama-3.1-70B", HostBudget(16 * GIB, 10 * GIB))
    assert not refused.fits and any(problem.startswith("disk:") for problem in refused.problems)


def test_ranks_of_a_machine_divide_its_ram_and_have_the_base_once() -> None:
    """70B, which takes 35 GiB: once for two ranks, or twice."""
    base = "meta-llama/Llama-3.1-70B"
    alone = planned(8, base)
    for copies in (1, 2):
        together = planned(8, base, replace(AMPLE, machine=Machine(2, copies)))
        assert together.execution == alone.execution
        assert together.host[LAYER_BUFFERS] == copies * alone.host[LAYER_BUFFERS]
        assert together.host[MATRICES] == copies * alone.host[MATRICES]
        for cause in together.host.keys() - {LAYER_BUFFERS, MATRICES}:
            assert together.host[cause] == 2 * alone.host[cause]
        assert together.peak_ram_bytes == sum(together.host.values())
        in_ram = [row for row in together.entries() if row.place in ("RAM", "pinned RAM")]
        load = sum(row.num_bytes for row in in_ram if row.phase == "load")
        assert load - sum(together.host[c] for c in (LAYER_BUFFERS, MATRICES, PROCESS)) == ROWS_BYTES
    one_copy = planned(8, base, HostBudget(60 * GIB, 2048 * GIB, machine=Machine(2, 1)))
    two_copies = planned(8, base, HostBudget(60 * GIB, 2048 * GIB, machine=Machine(2, 2)))
    assert one_copy.execution.head is Placement.RAM and two_copies.execution.head is Placement.DISK


def test_ranks_that_compute_on_a_cpu_divide_its_ram() -> None:
    for num_ranks, fits in ((1, True), (4, False)):
        host = HostBudget(3 * GIB, 100 * GIB, machine=Machine(num_ranks, num_ranks))
        plan = planned(2, "meta-llama/Llama-3.2-1B", host, target=CPU, model={"compute_dtype": "bfloat16"})
        assert plan.fits is fits
        of_devices = plan.peak_ram_bytes - sum(plan.host.values())
        assert (
            num_ranks * plan.peak_vram_bytes
            < of_devices
            <= num_ranks * (1 + HEAP_SHARE) * plan.peak_vram_bytes
        )


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_an_explicit_place_is_obeyed_although_the_device_has_room(place: str) -> None:
    plan = planned(80, memory={"weights": place})
    assert {*plan.execution.weights, plan.execution.embedding, plan.execution.head} == {Placement(place)}


def test_explicit_ram_that_is_not_there_is_refused() -> None:
    plan = planned(80, host=HostBudget(4 * GIB, 100 * GIB), memory={"weights": "ram"})
    assert any(problem.startswith("RAM:") for problem in plan.problems)


@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
def test_an_explicit_policy_is_obeyed(policy: str) -> None:
    plan = planned(24, memory={"activations": policy})
    assert set(plan.execution.activations) == {ActivationPolicy(policy)}
    assert plan.fits


def test_explicit_residents_never_stream() -> None:
    plan = planned(5, memory={"weights": "resident"})
    assert set(plan.execution.weights) == {Placement.DEVICE}
    assert not plan.fits or plan.peak_vram_bytes <= 5 * GIB


def test_below_the_floor_it_is_refused_with_the_floor_and_what_would_fit() -> None:
    plan = planned(2, data={"sequence_length": 16384})
    assert not plan.fits
    floor = plan.peak_vram_bytes
    assert planned(floor / GIB / 0.97, data={"sequence_length": 16384}).fits
    with pytest.raises(UserError, match="the floor is made of") as caught:
        plan.require_fit()
    assert "2.00 GiB" in str(caught.value) and caught.value.exit_code == 2


def test_long_contexts_are_cut_into_mlp_tiles() -> None:
    plan = planned(6, data={"sequence_length": 32768}, training={"gradient_accumulation_steps": 1})
    assert plan.fits and plan.execution.mlp_tile_tokens is not None


def test_on_a_cpu_what_does_not_fit_streams_from_disk() -> None:
    host = HostBudget(8 * GIB, 100 * GIB)
    plan = planned(4, host=host, rates=stated_rates(CPU), target=CPU, model={"compute_dtype": "bfloat16"})
    assert (
        plan.fits and Placement.RAM not in plan.execution.weights and Placement.DISK in plan.execution.weights
    )
    assert plan.execution.inputs is Placement.DEVICE
    assert plan.peak_ram_bytes > plan.peak_vram_bytes


def test_streaming_hides_behind_arithmetic_in_large_groups() -> None:
    """T* = 0.172 F / BW tokens: above it streaming costs next to nothing, below it copies decide."""
    plan = planned(80, memory={"weights": "ram", "activations": "recompute"}).execution
    plan = replace(plan, num_groups=1, hold_dequantized=False)
    for tokens, hidden in ((16 * 1024, True), (128, False)):
        asked = recipe(data={"sequence_length": tokens}, training={"gradient_accumulation_steps": 1})
        workload = workload_of(asked, known_shape("llama-3.1-8b"), GPU)
        seconds = step_time(workload, plan, RATES).total_seconds
        compute_seconds = step_time(workload, plan, replace(RATES, copy=math.inf)).total_seconds
        arithmetic = ("flops", "attention", "long_attention", "elementwise", "memory")
        only_copies = replace(RATES, **dict.fromkeys(arithmetic, math.inf))
        assert (seconds < 1.1 * compute_seconds) == hidden
        assert (step_time(workload, plan, only_copies).total_seconds > compute_seconds) != hidden


def test_a_step_waits_for_what_copies_take_longer_than_arithmetic() -> None:
    """Shared out between weights and activations by the bytes of each, as far as both wait in RAM."""
    asked = recipe(data={"sequence_length": 512}, training={"gradient_accumulation_steps": 1})
    workload = workload_of(asked, known_shape("llama-3.1-8b"), GPU)
    resident = planned(80, memory={"weights": "resident", "activations": "keep"}).execution
    streamed = replace(resident, weights=(Placement.RAM,) * 32, num_slots=2)
    both = replace(streamed, activations=(ActivationPolicy.OFFLOAD,) * 32)
    slow = replace(RATES, copy=RATES.copy / 1000)
    keys = ("waiting_for_weights_seconds", "waiting_for_activations_seconds")
    at_once = step_time(workload, resident, slow)
    assert [at_once.seconds[key] for key in keys] == [0, 0]
    late = step_time(workload, streamed, slow)
    assert late.seconds[keys[0]] == pytest.approx(late.total_seconds - at_once.total_seconds)
    assert late.seconds[keys[1]] == 0
    time = step_time(workload, both, slow)
    weights, activations = (time.seconds[key] for key in keys)
    assert weights / activations == pytest.approx(late.copied_bytes / (time.copied_bytes - late.copied_bytes))
    assert weights + activations == pytest.approx(time.total_seconds - at_once.total_seconds)


def test_flops_per_token_and_parameter() -> None:
    """4 keeping everything, 5.46 recomputing without the last product (Llama's proportions)."""
    asked = recipe(lora={"rank": 1}, data={"sequence_length": 16})
    workload = workload_of(asked, known_shape("llama-3.1-8b"), GPU)
    kept = planned(80).execution
    recomputed = replace(kept, activations=(ActivationPolicy.RECOMPUTE,) * 32)
    work = workload.num_tokens * workload.num_micro_batches * 32 * workload.shape.layer_parameters
    head = 4 * workload.num_supervised * workload.num_micro_batches * workload.shape.matrix_parameters
    assert (step_time(workload, kept, RATES).flops - head) / work == pytest.approx(4, rel=0.01)
    assert (step_time(workload, recomputed, RATES).flops - head) / work == pytest.approx(5.46, rel=0.01)
    dora = replace(workload, use_dora=True)  # every product with a weight once more in backward
    assert (step_time(dora, kept, RATES).flops - head) / work == pytest.approx(6, rel=0.01)


def test_a_recipe_becomes_a_plan_for_a_device() -> None:
    asked = recipe("meta-llama/Llama-3.2-1B", memory={"vram": "6 GiB"})
    plan = plan_recipe(asked, replace(GPU, name="NVIDIA GeForce RTX 4090"), 80 * GIB)
    assert plan.budget_bytes == 6 * GIB and "RTX 4090" in plan.rates.source
    free = plan_recipe(recipe("meta-llama/Llama-3.2-1B"), GPU, 10 * GIB)
    assert free.budget_bytes == int(9.5 * GIB)
    with_context = plan_recipe(recipe("meta-llama/Llama-3.2-1B"), GPU, 10 * GIB, has_context=True)
    assert with_context.budget_bytes == free.budget_bytes + GPU.context_bytes


@pytest.mark.parametrize("number", [1, 7, 33, 100_000])
def test_any_number_of_micro_batches_is_planned(number: int) -> None:
    """No more than 32 pass the layers together: a plan of 100,000 takes no longer than one of 64."""
    plan = planned(40, training={"gradient_accumulation_steps": number}, data={"sequence_length": 512})
    assert plan.fits and -(-number // plan.execution.num_groups) <= MOST_TOGETHER


@pytest.mark.parametrize("gib", [3, 5, 9, 14, 40])
def test_what_is_planned_is_what_the_walk_takes_and_the_sum_is_near(gib: float) -> None:
    plan = planned(gib)
    walked = sum(step_bytes(plan.workload, plan.execution).device.values())
    assert plan.step_vram_bytes == walked
    assert peak_by_sum(plan.workload, plan.execution) == pytest.approx(walked, rel=0.1)


@pytest.mark.parametrize(("base", "gib"), [("meta-llama/Llama-3.1-70B", 24), ("meta-llama/Llama-3.1-8B", 1)])
def test_a_plan_is_made_in_seconds(base: str, gib: float) -> None:
    """Also one that is refused, with what would fit. Measured: 2 to 4 s of one core; a search that grows
    with layers or budget takes minutes, on any machine."""
    for made_before in (planned_model, layer_bytes, _loss_bytes, _shape_of):
        made_before.cache_clear()
    begun = time.process_time()
    planned(gib, base)
    assert time.process_time() - begun < 60
