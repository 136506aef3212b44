"""On a GPU as on a CPU: wherever weights, head, embedding, inputs and saved tensors wait, a step computes the
same bits; and running out of memory ends in a tighter plan and the same bits.

Documents are shorter than a block of attention's keys, so that its backward pass adds in one order only.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_models import NF4, packed_row, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.device.context import make_workspaces
from qlora_train.kernels.on_device import find_device
from qlora_train.micro_batch import MicroBatch
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.walk.step import StepRunner
from qlora_train.walk.step_state import StepState
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement
from qlora_train.weights.load import load_base

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic")]
KEEP, RECOMPUTE, OFFLOAD = ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE, ActivationPolicy.OFFLOAD
DEVICE, RAM, DISK = Placement.DEVICE, Placement.RAM, Placement.DISK
NUM_LAYERS, NUM_STEPS = 6, 3
LENGTHS = [120, 1, 63, 100, 17, 64] * 3
PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "ram": {"weights": (RAM,) * 6, "num_slots": 2},
    "disk": {"weights": (DISK,) * 6, "num_slots": 3},
    "some": {"weights": (DEVICE, RAM, DEVICE, DISK, DISK, RAM), "num_slots": 2},
    "all in ram": {"weights": (RAM,) * 6, "num_slots": 2, "head": RAM, "embedding": RAM, "inputs": RAM},
    "all on disk": {"weights": (DISK,) * 6, "num_slots": 2, "head": DISK, "embedding": DISK, "inputs": RAM},
}
POLICIES = {
    "keep": (KEEP,) * 6,
    "recompute": (RECOMPUTE,) * 6,
    "offload": (OFFLOAD,) * 6,
    "mixed": (RECOMPUTE, OFFLOAD, KEEP, OFFLOAD, RECOMPUTE, KEEP),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": NUM_LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return write_checkpoint(tmp_path_factory.mktemp("base"), vocab_size=5000, **sizes, **heads)


def plan_of(policy: str, places: str, **changes: Any) -> ExecutionPlan:
    options = {"loss_tokens": 200, "head_tile_rows": 1024} | PLACES[places] | changes
    return resident_plan(*POLICIES[policy], **options)


def batches_on(device: torch.device, number: int, lengths: list[int]) -> list[PackedTokens]:
    return [_on(device, packed_row(lengths, seed=k, first_row=k)) for k in range(number)]


def _on(device: torch.device, tokens: PackedTokens) -> PackedTokens:
    host = MicroBatch(
        token_ids=tokens.ids.host,
        position_ids=tokens.position_ids[0].numpy(),
        labels=tokens.labels.numpy(),
        cu_seqlens=torch.tensor(tokens.documents.boundaries).numpy(),
        row_ids=tokens.rows.numpy(),
        token_offsets=tokens.offsets.numpy(),
    )
    return PackedTokens.from_host(host, device)


def loaded(folder: Path, plan: ExecutionPlan, gpu: torch.device) -> tuple[FrozenDecoder, LoraParameters]:
    decoder = load_base(
        folder,
        NF4,
        torch.bfloat16,
        find_device(gpu),
        plan=plan,
        cache=folder.parent / "quantized",
        poison=True,
    )
    decoder.skippable = ("mlp.down_proj",)
    decoder.fuse(norms=True, mlps=True, qkv=True)
    lora = LoraParameters(
        decoder.linears, rank=8, scaling=2.0, dropout=0.1, seed=0, dtype=torch.bfloat16, device=gpu
    )
    draw = torch.Generator().manual_seed(1)
    lora.masters.copy_(0.1 * torch.randn(lora.masters.shape, generator=draw))
    lora.refresh_working()
    return decoder, lora


def steps(folder: Path, plan: ExecutionPlan, gpu: torch.device) -> Tensor:
    """Loss and gradient of several steps with the same factors, one after another without a wait."""
    decoder, lora = loaded(folder, plan, gpu)
    batches = batches_on(gpu, 4, LENGTHS)
    walk = LayerWalk(decoder, lora, plan, reference=False)
    num_supervised = sum(len(batch.supervised) for batch in batches)
    found = []
    for step in range(NUM_STEPS):
        lora.gradient.zero_()
        loss = walk.accumulate(batches, seed=3, step=step, num_supervised=num_supervised)
        found += [loss[None], lora.gradient.clone()]
    decoder.close()
    return torch.cat(found)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, Tensor]:
    return {}


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("places", PLACES)
def test_the_same_bits_from_anywhere(
    gpu: torch.device, folder: Path, expected: dict[int, Tensor], places: str, policy: str, num_groups: int
) -> None:
    if num_groups not in expected:
        expected[num_groups] = steps(folder, plan_of("keep", "resident", num_groups=num_groups), gpu)
        assert torch.isfinite(expected[num_groups]).all() and expected[num_groups].count_nonzero() > 10**6
    found = steps(folder, plan_of(policy, places, num_groups=num_groups), gpu)
    assert torch.equal(found, expected[num_groups])


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("tile", [None, 300])
def test_the_same_bits_with_tiles_and_held_weights(
    gpu: torch.device, folder: Path, hold: bool, tile: int | None
) -> None:
    changes = {"hold_dequantized": hold, "mlp_tile_tokens": tile}
    resident = steps(folder, plan_of("recompute", "resident", mlp_tile_tokens=tile), gpu)
    assert torch.equal(steps(folder, plan_of("recompute", "all in ram", **changes), gpu), resident)


def test_a_step_that_runs_out_of_memory_is_tried_again_and_has_the_same_bits(
    gpu: torch.device, folder: Path
) -> None:
    """The allocator's limit lies between what keeping and what recomputing everything takes."""
    gradients, peaks = [], []
    plan = plan_of("keep", "some")
    for start in (plan, replace(plan, activations=(RECOMPUTE,) * 6)):
        gradient, peak_bytes, _ = one_step(gpu, folder, start, None)
        gradients.append(gradient)
        peaks.append(peak_bytes)
    assert torch.equal(*gradients) and peaks[0] > 1.5 * peaks[1]
    limit_bytes = peaks[1] + (peaks[0] - peaks[1]) // 2
    gradient, peak_bytes, changes = one_step(gpu, folder, plan, limit_bytes)
    assert changes and all("recomputed" in change for change in changes)
    assert peak_bytes <= limit_bytes and torch.equal(gradient, gradients[0])


def one_step(
    gpu: torch.device, folder: Path, plan: ExecutionPlan, limit_bytes: int | None
) -> tuple[Tensor, int, list[str]]:
    """Gradient on the host, the allocator's peak (reserved) and the tighter plans of one optimizer step."""
    gc.collect()
    torch.cuda.empty_cache()
    make_workspaces(find_device(gpu))
    if limit_bytes is not None:
        total_bytes = torch.cuda.mem_get_info(gpu)[1]
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes, gpu)
    try:
        torch.cuda.reset_peak_memory_stats(gpu)
        decoder, lora = loaded(folder, plan, gpu)
        changes: list[str] = []
        optimizer = FlatOptimizer("adamw_8bit", lora, find_device(gpu), lora_b_lr_ratio=1.0, weight_decay=0.0)
        runner = StepRunner(
            LayerWalk(decoder, lora, plan, reference=False),
            decoder,
            lora,
            optimizer,
            StepState(),
            Accelerator(),
            max_grad_norm=1e9,
            seed=0,
            on_tighter_plan=lambda step, plan, change: changes.append(change),
        )
        batches = batches_on(gpu, 2, LENGTHS * 8)
        outcome = runner.run(1, batches, sum(len(batch.supervised) for batch in batches), 1e-4)
        assert outcome.applied
        decoder.close()
        return lora.gradient.cpu(), torch.cuda.max_memory_reserved(gpu), changes
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
