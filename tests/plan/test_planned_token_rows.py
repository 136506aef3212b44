"""The plan of a step that trains rows of added tokens, against the meter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import packed_row, tiny_config, write_checkpoint

from qlora_train.device.compute import THE_CPU
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.errors import UnsupportedModelError
from qlora_train.model.base import read_config
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.plan.model_shape import ModelShape, shape_of
from qlora_train.plan.planned_walk import step_bytes
from qlora_train.plan.workload import Workload
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.weights.execution_plan import ActivationPolicy, everything_resident
from qlora_train.weights.load import load_base

NF4 = Quantization("nf4", double_quant=True)
NUM_ADDED, VOCABULARY = 20, 3000
IDS = (7, *range(VOCABULARY, VOCABULARY + NUM_ADDED - 1))
DOCUMENTS = (100, 28)


def workload(shape: ModelShape, reference: bool) -> Workload:
    return Workload(
        shape=shape,
        quantization=NF4,
        dtype=torch.bfloat16,
        lora_ranks=tuple((path, 8) for path in shape.linear_shapes),
        documents=DOCUMENTS,
        num_supervised=sum(DOCUMENTS) - 3 * len(DOCUMENTS),
        num_micro_batches=2,
        num_added_tokens=NUM_ADDED,
        reference=reference,
        target=THE_CPU.description,
    )


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_takes_what_was_planned(tmp_path: Path, tied: bool, reference: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": VOCABULARY}
    folder = write_checkpoint(tmp_path, "llama", tie_word_embeddings=tied, **sizes)
    shape = shape_of(read_config(folder))
    activations = (ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE, ActivationPolicy.KEEP)
    plan = replace(everything_resident(3), activations=activations, loss_tokens=64, head_tile_rows=1024)
    quantize([torch.zeros(64, 64)], (64, 64), NF4)  # the quantizer's look-up table is made once
    rows = [packed_row(list(DOCUMENTS), seed=k) for k in range(2)]
    with MemoryTracker(THE_CPU) as meter:
        batches = [row.moved(torch.Tensor.clone) for row in rows]
        decoder = load_base(folder, NF4, torch.bfloat16, THE_CPU, plan=plan)
        decoder.skippable = shape.probed.skippable
        if not reference:
            decoder.fuse(norms=True, mlps=True, qkv=True)
        lora = LoraParameters(
            decoder.linears, rank=8, scaling=2.0, dropout=0.0, seed=0, dtype=torch.bfloat16, device="cpu",
            token_rows={path: torch.zeros(NUM_ADDED, 256) for path in decoder.matrix_paths},
        )  # fmt: skip
        decoder.set_token_rows(IDS, lora.token_rows(lora.working), lora.token_rows(lora.gradient))
        optimizer = FlatOptimizer("adamw", lora, THE_CPU, lora_b_lr_ratio=1.0, weight_decay=0.0)
        walk = LayerWalk(decoder, lora, plan, reference=reference)
        for step in (1, 2):
            meter.reset_peak()
            lora.gradient.zero_()
            walk.accumulate(batches, seed=0, step=step, num_supervised=100)
            optimizer.step(1e-4)
        measured = meter.peak_bytes
    run = workload(shape, reference)
    assert run.num_lora_parameters == lora.masters.numel() and run.lora_sizes[0] == lora.first_b
    predicted = sum(step_bytes(run, plan).device.values())
    assert -0.02 < predicted / measured - 1 < (0.1 if reference else 0.05)


def test_heads_without_room_for_rows_are_refused() -> None:
    quantized = replace(shape_of(tiny_config("llama")), head_quantization=Quantization("int8"))
    biased = shape_of(tiny_config("ernie4_5_moe", use_bias=True))
    for shape, reason in (
        (quantized, "has its head quantized"),
        (biased, "the head of ernie4_5_moe has a bias"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"model\.add_tokens: .*{reason}"):
            step_bytes(workload(shape, reference=False), everything_resident(3))
