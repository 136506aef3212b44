"""Plans of generation: the order of preference, hard budgets, what is refused, and the meter."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NF4, tiny_config
from transformers import AutoModelForCausalLM

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.device.description import CPU as TARGET_CPU
from qlora_train.device.description import DeviceDescription, planned_gpu
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.errors import UserError
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.sampling import Sampling
from qlora_train.plan.fixed_bytes import KV_CACHE, OPTIMIZER, WORKING
from qlora_train.plan.generation import GenerationPlan, plan_generation
from qlora_train.plan.host_budget import HostBudget
from qlora_train.plan.model_shape import find_shape, known_shape
from qlora_train.plan.placement import placed
from qlora_train.plan.plan import room_in
from qlora_train.plan.planned_walk import GenerateSize, generate_peak, load_peak
from qlora_train.plan.workload import Workload, workload_of
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.recipe import Recipe
from qlora_train.weights.execution_plan import Placement, everything_resident
from qlora_train.weights.load import load_base

GIB = 2**30
AMPLE = HostBudget(512 * GIB, 2048 * GIB)
SIXTEEN_BITS = Quantization("none"), torch.bfloat16
GPU = planned_gpu("NVIDIA GeForce RTX 4090", (8, 9))


def planned(
    gib: float,
    size: GenerateSize = GenerateSize(),  # noqa: B008
    base: str = "llama-3.1-8b",
    host: HostBudget = AMPLE,
    target: DeviceDescription = GPU,
    **options: Any,
) -> GenerationPlan:
    workload = Workload(known_shape(base), *SIXTEEN_BITS, target)
    return plan_generation(workload, size, int(gib * GIB), host, **options)


@pytest.mark.parametrize("gib", [2, 3, 4, 6, 8, 12, 16, 17, 20, 80])
def test_a_budget_is_never_exceeded_and_as_few_layers_as_fit_stream(gib: float) -> None:
    plan = planned(gib)
    plan.require_fit()
    assert plan.peak_bytes <= gib * GIB
    weights = plan.execution.weights
    num_streamed = len(weights) - weights.count(Placement.DEVICE)
    if plan.execution.is_resident:
        assert gib >= 16
    else:
        assert plan.execution.embedding is Placement.RAM
    if num_streamed:
        one_less = placed(plan.execution, num_streamed - 1, place=Placement.RAM, is_tied=False)
        then = generate_peak(plan.workload, one_less, plan.size, in_training=False)
        bytes_then = max(sum(then.values()), sum(load_peak(plan.workload, one_less).values()))
        assert bytes_then > room_in(int(gib * GIB), plan.workload)


def test_the_embedding_goes_before_the_head_and_the_head_before_layers() -> None:
    room = planned(80).peak_bytes / GIB + 0.46
    places = [planned(room / 0.98 - less).execution for less in (0, 0.1, 1.1, 2.1)]
    assert places[0].is_resident
    assert (places[1].embedding, places[1].head) == (Placement.RAM, Placement.DEVICE)
    assert (places[2].embedding, places[2].head) == (Placement.RAM, Placement.RAM)
    assert set(places[2].weights) == {Placement.DEVICE}
    assert set(places[3].weights) == {Placement.DEVICE, Placement.RAM}


def test_a_token_copies_what_streams_once() -> None:
    assert planned(80).copied_bytes_per_token == 0
    plan = planned(2)
    num_streamed = plan.execution.weights.count(Placement.RAM)
    head = plan.workload.matrix_bytes
    assert plan.copied_bytes_per_token == num_streamed * plan.workload.layer_buffer_bytes + head


def test_the_cache_of_all_prompts_is_in_the_plan() -> None:
    few, many = planned(6, GenerateSize((1000,), 24)), planned(6, GenerateSize((1000,) * 16, 24))
    cache = 2 * 32 * 8 * 128 * 1024 * 2
    assert few.phases["generate"][KV_CACHE] == cache
    assert many.phases["generate"][KV_CACHE] == 16 * cache
    assert many.execution.weights.count(Placement.RAM) > few.execution.weights.count(Placement.RAM)


def test_a_long_prompt_passes_the_mlp_in_tiles_where_it_must() -> None:
    size = GenerateSize((30_000,), 16)
    assert planned(16, size).execution.mlp_tile_tokens is None
    least = planned(0.1, size)
    assert least.problems and least.execution.mlp_tile_tokens is not None
    tight = planned((least.peak_bytes + 2**29) / GIB / 0.98 + 0.1, size)
    assert not tight.problems and tight.execution.mlp_tile_tokens is not None


def test_rows_are_evaluated_together_where_weights_are_streamed_and_they_fit() -> None:
    size = GenerateSize((100,), 8, evaluated_tokens=2048)
    found = [planned(gib, size) for gib in (80, 4, 8)]
    assert found[0].execution.is_resident and found[0].evaluation_group == 1
    for plan in found[1:]:
        alone = planned(plan.budget_bytes / GIB, replace(size, evaluated_rows=1))
        assert plan.evaluation_group > 1 == alone.evaluation_group and plan.execution == alone.execution
        together, one = (sum(p.phases["evaluate"].values()) for p in (plan, alone))
        hidden_bytes = 2048 * 4096 * 2  # of a row
        assert together - one >= (plan.evaluation_group - 1) * hidden_bytes
        assert plan.peak_bytes <= plan.budget_bytes and not plan.problems
    assert planned(4, replace(size, evaluated_rows=3)).evaluation_group == 3
    assert planned(4, GenerateSize()).evaluation_group == 1


def test_from_disk_where_ram_is_short_and_on_a_cpu() -> None:
    assert set(planned(2, host=HostBudget(8 * GIB, 0)).execution.weights) == {Placement.DISK}
    plan = planned(2, target=TARGET_CPU)
    assert Placement.DISK in plan.execution.weights and plan.execution.embedding is Placement.DISK


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_a_place_that_the_recipe_says_is_obeyed(place: str) -> None:
    plan = planned(80, weights=place)
    assert set(plan.execution.weights) == {Placement(place)} and plan.execution.head is Placement(place)


def test_a_trained_model_has_its_factors_but_no_optimizer_state() -> None:
    recipe = Recipe.from_dict({"model": {"base": "meta-llama/Llama-3.1-8B"}, "data": {"train": "x"}})
    workload = workload_of(recipe, known_shape("llama-3.1-8b"), GPU)
    plan = plan_generation(workload, GenerateSize(), 24 * GIB, AMPLE)
    causes = plan.phases["generate"]
    assert causes[WORKING] == 2 * workload.num_lora_parameters and OPTIMIZER not in causes
    assert OPTIMIZER in generate_peak(workload, plan.execution, GenerateSize())


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    size = GenerateSize((4000,) * 8, 4000)
    plan = planned(4, size)
    with pytest.raises(UserError) as refused:
        plan.require_fit()
    lines = str(refused.value).splitlines()
    assert "at least" in lines[1] and "8 prompts of up to 4000 tokens and 4000 new ones" in lines[1]
    assert "the budget is 4.00 GiB" in lines[1] and "key-value cache 7.81" in lines[2]
    assert "one prompt at a time" in str(refused.value)
    planned(4, replace(size, prompts=(4000,))).require_fit()
    assert planned(4, weights="resident").advice == ("memory.weights=auto",)
    with pytest.raises(UserError, match="take a smaller model or a larger budget"):
        planned(0.5).require_fit()


def test_the_refusal_names_the_least_budget() -> None:
    found = re.search(r"at least ([\d.]+) GiB are needed", planned(0.5).problems[0])
    assert found is not None
    least = float(found[1])
    planned(least + 0.006).require_fit()
    assert planned(least - 0.006).problems


def test_too_little_ram_is_said() -> None:
    plan = planned(8, host=HostBudget(2 * GIB, 0), target=TARGET_CPU, base="llama-3.1-70b")
    with pytest.raises(UserError, match=r"RAM: .* GiB are needed, 2\.00 GiB are free"):
        plan.require_fit()


METERED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 1000}),
    "tied": ("llama", {"hidden_size": 192, "vocab_size": 5000, "tie_word_embeddings": True}),
    "one kv head": ("llama", {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 1}),
    "convolutions": ("lfm2", {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 1000}),
    "delta nets": ("qwen3_5_text", {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 1000}),
    "qwen3": ("qwen3", {"hidden_size": 192, "intermediate_size": 576, "vocab_size": 3000, "head_dim": 64}),
}


@pytest.mark.parametrize("size", [GenerateSize((200,), 3), GenerateSize((40, 7, 130), 60)])
@pytest.mark.parametrize(
    ("quantization", "dtype"), [(NF4, torch.bfloat16), (Quantization("none"), torch.float32)]
)
@pytest.mark.parametrize("name", METERED)
def test_plan_matches_meter(
    name: str,
    quantization: Quantization,
    dtype: torch.dtype,
    size: GenerateSize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within 1 %, resident, streamed, and with the MLP in tiles; delta nets run prompt by prompt, which takes
    less than a batch of them, as planned."""
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    family, sizes = METERED[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, max_position_embeddings=512, **sizes))
    model.save_pretrained(tmp_path / "base")
    shape = find_shape(str(tmp_path / "base"))
    workload = Workload(shape, quantization, dtype, TARGET_CPU)
    resident = everything_resident(shape.num_layers)
    streamed = placed(resident, shape.num_layers, place=Placement.DISK, is_tied=shape.is_tied)
    if quantization.is_4bit:
        quantize([torch.zeros(64, 64)], (64, 64), quantization)  # the quantizer's look-up table is made once
    for execution in (resident, streamed):
        prompts = [[token % shape.vocabulary for token in range(length)] for length in size.prompts]
        with MemoryTracker(CPU) as meter:
            decoder = load_base(tmp_path / "base", quantization, dtype, CPU, plan=execution)
            decoder.fuse(norms=True, mlps=True, qkv=True)
            meter.reset_peak()
            generate_tokens(decoder, prompts, Sampling(size.new_tokens), frozenset())
        decoder.close()
        by_cause = generate_peak(workload, execution, size, in_training=False)
        most = 1.06 if name == "delta nets" else 1.01
        assert 0.99 < sum(by_cause.values()) / meter.peak_bytes < most, by_cause
