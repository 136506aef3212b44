"""A model without numbers takes the bytes of one with numbers: layer by layer for every family that the
start-up probe accepts, and in whole walks under every policy."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_meter import as_in_the_first_step, cpu_model, measured, small_config, workload_for
from tiny_models import OTHER_FAMILIES, packed_row, tiny_config

from qlora_train.device.memory_tracker import StorageMeter
from qlora_train.model.loss import TiledLoss
from qlora_train.plan.planned_model import PlannedHost, PlannedLoss, PlannedModel
from qlora_train.plan.planned_walk import set_up
from qlora_train.plan.workload import Workload
from qlora_train.quant.formats import Quantization
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement, everything_resident

FAMILIES = (
    "apertus", "arcee", "bitnet", "cohere", "cohere2", "diffllama", "ernie4_5", "exaone4", "gemma", "gemma2",
    "gemma3_text", "glm", "glm4", "granite", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3",
    "iquestcoder", "jais2", "llama", "minicpm3", "ministral", "ministral3", "mistral", "moshi", "olmo",
    "olmo2", "olmo3", "phi3", "phi4_multimodal", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
    "vaultgemma",
)  # fmt: skip
STATISTICS_IN_FP32 = {"starcoder2": 0.004, "jais2": 0.004}
"""LayerNorm's mean and deviation are in fp32 on the meta device, as on a GPU; a CPU keeps them in 16 bits."""
DOCUMENTS = (50, 7, 33, 50, 48)
KEEP, RECOMPUTE, OFFLOAD = ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE, ActivationPolicy.OFFLOAD


@pytest.mark.parametrize(
    ("dtype", "documents"), [(torch.bfloat16, DOCUMENTS), (torch.float32, (200,))], ids=str
)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_a_layer_of_every_family(family: str, dtype: torch.dtype, documents: tuple[int, ...]) -> None:
    """All kinds of layers; of experts the first ones, which get every token, as the plan says."""
    config = tiny_config(family) if family in OTHER_FAMILIES else small_config(family)
    check_layers(family, workload_for(config, dtype, documents))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "qwen3_moe"])
@pytest.mark.parametrize(
    ("dtype", "documents"), [(torch.bfloat16, DOCUMENTS), (torch.float32, (20,))], ids=str
)
def test_a_layer_with_dora(family: str, dtype: torch.dtype, documents: tuple[int, ...]) -> None:
    """Also of a few tokens, where row norms take more than the layer's values."""
    config = tiny_config(family) if family in OTHER_FAMILIES else small_config(family)
    check_layers(family, workload_for(config, dtype, documents, use_dora=True))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("dtype", "documents"), [(torch.bfloat16, DOCUMENTS), (torch.float32, (200,))], ids=str
)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_a_layer_with_lora_on_experts(
    family: str, dtype: torch.dtype, documents: tuple[int, ...], reference: bool
) -> None:
    """Of ranks 4 and 40: what the LoRA of one expert takes is a good part of the layer's values."""
    config = tiny_config(family)
    for rank in (4, 40):
        check_layers(family, with_experts(workload_for(config, dtype, documents, reference=reference), rank))


def with_experts(workload: Workload, rank: int) -> Workload:
    """The workload with LoRA on experts too."""
    experts = dict.fromkeys(workload.shape.expert_shapes, rank)
    return replace(workload, lora_ranks=tuple((dict(workload.lora_ranks) | experts).items()))


def check_layers(family: str, workload: Workload) -> None:
    documents = workload.documents
    decoder, _ = cpu_model(workload)
    planned = PlannedModel(workload)
    tokens = planned.micro_batch(documents, sum(documents))
    for index in {kind: i for i, kind in enumerate(planned.decoder.kinds)}.values():
        expected = measured(decoder, index, packed_row(list(documents)))
        found = measured(planned.decoder, index, tokens, lambda: planned.meter(len(documents)))
        within = STATISTICS_IN_FP32.get(family, 0)
        for name, num_bytes in vars(expected).items():
            assert getattr(found, name) == pytest.approx(num_bytes, rel=within), name


def test_the_readme_lists_the_families_that_pass() -> None:
    """Those of the test above, and no other."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| | pass today |")[2].partition("\n\n")[0]
    listed = [name.strip() for row in table.splitlines()[2:] for name in row.split("|")[2].split(",")]
    assert sorted(listed) == sorted({name.partition("+")[0] for name in (*FAMILIES, *OTHER_FAMILIES)})


def peak_on_cpu(workload: Workload, plan: ExecutionPlan) -> int:
    decoder, lora = cpu_model(workload)
    decoder.head.tile_rows = plan.head_tile_rows
    walk = LayerWalk(decoder, lora, plan, reference=workload.reference)
    tokens = [packed_row(list(workload.documents), seed=k) for k in range(workload.num_micro_batches)]
    walk.accumulate(tokens, seed=0, step=1, num_supervised=100)  # what is made once is there afterwards
    gc.collect()
    as_in_the_first_step(decoder)
    with StorageMeter("cpu") as meter:
        walk.accumulate(tokens, seed=0, step=1, num_supervised=100)
    return meter.peak_bytes


def peak_of_plan(workload: Workload, plan: ExecutionPlan, make_loss: type[TiledLoss] = PlannedLoss) -> int:
    model, tokens, meter = set_up(workload, plan)
    walk = LayerWalk(
        model.decoder, model.lora, plan, reference=workload.reference,
        host=PlannedHost(model.device, meter), make_loss=make_loss,
    )  # fmt: skip
    with meter:
        walk.accumulate([tokens] * workload.num_micro_batches, seed=0, step=1, num_supervised=100)
    return meter.peak_bytes


WALKED = ("llama", "gemma2", "gemma3_text", "olmo2", "cohere2", "bitnet", "diffllama", "minicpm3")
WALKS: dict[str, tuple[tuple[ActivationPolicy, ...], dict[str, Any], dict[str, Any]]] = {
    "keep": ((KEEP,) * 4, {}, {}),
    "recompute": ((RECOMPUTE,) * 4, {"num_micro_batches": 2}, {}),
    "mixed": ((RECOMPUTE, KEEP, OFFLOAD, RECOMPUTE), {"num_micro_batches": 3}, {"num_groups": 2}),
    "tiles": ((RECOMPUTE, KEEP, RECOMPUTE, KEEP), {}, {"mlp_tile_tokens": 24}),
    "inputs in RAM": ((RECOMPUTE,) * 4, {"num_micro_batches": 2}, {"inputs": Placement.RAM}),
}


DROPOUT: tuple[tuple[ActivationPolicy, ...], dict[str, Any], dict[str, Any]] = (
    (RECOMPUTE, KEEP, RECOMPUTE, KEEP), {"dropout": True}, {"mlp_tile_tokens": 24}
)  # fmt: skip
"""Masks are a linear's matter, not a family's, and slow under a meter: for one family, with and without a
mixture of experts."""


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *product(WALKED, WALKS),
        *product(("qwen3_moe", "qwen3_5_moe_text"), WALKS),
        *product(("llama", "qwen3_moe"), ["dropout"]),
    ],
)
def test_a_walk_takes_what_the_plan_says(family: str, name: str) -> None:
    """Of experts the first ones get every token, as the plan says."""
    activations, changes, cuts = (WALKS | {"dropout": DROPOUT})[name]
    config = small_config(family, 4) if family in WALKED else tiny_config(family, num_hidden_layers=4)
    workload = workload_for(config, documents=DOCUMENTS, **({"num_supervised": 173} | changes))
    plan = replace(everything_resident(4), activations=activations, loss_tokens=64, head_tile_rows=40, **cuts)
    within = 0.03 if family == "qwen3_5_moe_text" else 0  # its chunked recurrence ends a little later there
    assert peak_of_plan(workload, plan) == pytest.approx(peak_on_cpu(workload, plan), rel=within)


@pytest.mark.parametrize(("quantization", "holds"), [*product(("nf4", "fp4", "int8"), (False, True))])
def test_a_walk_over_quantised_weights(quantization: str, holds: bool) -> None:
    quantised = Quantization(quantization, double_quant=quantization == "nf4")  # type: ignore[arg-type]
    cut = {"num_micro_batches": 2, "num_supervised": 197}
    workload = workload_for(small_config("llama", 4), quantization=quantised, **cut)
    plan = replace(
        everything_resident(4), activations=(RECOMPUTE, KEEP, OFFLOAD, RECOMPUTE), hold_dequantized=holds,
        loss_tokens=64, head_tile_rows=40,
    )  # fmt: skip
    assert peak_of_plan(workload, plan) == peak_on_cpu(workload, plan)


@pytest.mark.parametrize("reference", [False, True])
def test_layers_with_other_targets_or_ranks_are_other_kinds(reference: bool) -> None:
    """Four layers: as they are, without LoRA on k, with a larger rank on up, and as the first."""
    workload = workload_for(
        small_config("llama", 4), documents=DOCUMENTS, num_supervised=173, reference=reference
    )
    ranks = dict(workload.lora_ranks)
    del ranks["model.layers.1.self_attn.k_proj"]
    ranks["model.layers.2.mlp.up_proj"] = 96
    mixed = replace(workload, lora_ranks=tuple(ranks.items()))
    assert PlannedModel(workload).decoder.kinds == [0, 0, 0, 0]
    assert PlannedModel(mixed).decoder.kinds == [0, 1, 2, 0]
    plan = replace(everything_resident(4, activation=KEEP), loss_tokens=64, head_tile_rows=40)
    assert peak_of_plan(mixed, plan) == peak_on_cpu(mixed, plan) > peak_of_plan(workload, plan)


@pytest.mark.parametrize("activation", [KEEP, RECOMPUTE])
def test_a_walk_in_reference_mode(activation: ActivationPolicy) -> None:
    workload = workload_for(small_config("llama", 3), reference=True, num_supervised=197)
    plan = everything_resident(3, activation=activation)
    assert peak_of_plan(workload, plan) == peak_on_cpu(workload, plan)


DORA_WALKS: dict[str, tuple[tuple[ActivationPolicy, ...], dict[str, Any], dict[str, Any]]] = {
    "keep": ((KEEP,) * 4, {}, {}),
    "recompute": ((RECOMPUTE,) * 4, {"num_micro_batches": 2}, {}),
    "tiles": ((RECOMPUTE, KEEP, RECOMPUTE, KEEP), {}, {"mlp_tile_tokens": 24}),
    "reference": ((RECOMPUTE,) * 4, {"reference": True}, {}),
    "reference, kept": ((KEEP,) * 4, {"reference": True}, {}),
}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", [name for name in WALKS if name != "tiles"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_walk_with_lora_on_experts(family: str, name: str, quantization: str) -> None:
    activations, changes, cuts = WALKS[name]
    workload = workload_for(
        tiny_config(family, num_hidden_layers=4), documents=DOCUMENTS,
        quantization=Quantization(quantization), **({"num_supervised": 173} | changes),  # type: ignore[arg-type]
    )  # fmt: skip
    workload = with_experts(workload, 24)
    plan = replace(everything_resident(4), activations=activations, loss_tokens=64, head_tile_rows=40, **cuts)
    assert peak_of_plan(workload, plan) == peak_on_cpu(workload, plan)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", DORA_WALKS)
def test_a_walk_with_dora(name: str, quantization: str) -> None:
    """Of a few tokens, where row norms count most, and of many."""
    activations, changes, cuts = DORA_WALKS[name]
    plan = replace(everything_resident(4), activations=activations, loss_tokens=64, head_tile_rows=40, **cuts)
    for documents in ((30,), DOCUMENTS):
        workload = workload_for(
            small_config("llama", 4), documents=documents, quantization=Quantization(quantization),  # type: ignore[arg-type]
            use_dora=True, **({"num_supervised": sum(documents) - 3 * len(documents)} | changes),
        )  # fmt: skip
        assert peak_of_plan(workload, plan) == peak_on_cpu(workload, plan)


def test_an_offloaded_walk_is_over_by_what_the_last_layer_takes_back_at_once() -> None:
    """The first graph that is taken back was not fetched before: its tensors come one by one, when they are
    needed; played back, all come together."""
    workload = workload_for(small_config("llama", 4), num_micro_batches=2, num_supervised=197)
    plan = replace(everything_resident(4, activation=OFFLOAD), loss_tokens=64, head_tile_rows=40)
    assert 0 <= peak_of_plan(workload, plan) / peak_on_cpu(workload, plan) - 1 < 0.05


def test_what_the_loss_plays_back_is_what_it_takes() -> None:
    """Also with many tiles, and more than one size of block."""
    workload = workload_for(small_config("gemma2", 2, vocab_size=1000), num_supervised=190)
    plan = replace(everything_resident(2, activation=RECOMPUTE), loss_tokens=64, head_tile_rows=300)
    assert peak_of_plan(workload, plan) == peak_of_plan(workload, plan, TiledLoss)
