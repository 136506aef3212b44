"""Trained rows of tokens: the same bits from anywhere, the same sums in any split (PEFT's: test_peft.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY_SIZE, load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.walk.evaluate import loss_sum as evaluated
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement

IDS = (5, 79, 80, VOCABULARY_SIZE, VOCABULARY_SIZE + 1)
"""Known and new tokens; 79 and 80 are in two tiles of the head, the new ones in a third."""
VOCABULARY = VOCABULARY_SIZE + 2
KEEP, RECOMPUTE, OFFLOAD = ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE, ActivationPolicy.OFFLOAD
DEVICE, RAM, DISK = Placement.DEVICE, Placement.RAM, Placement.DISK


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))


def step(folder: Path, plan: ExecutionPlan, *, reference: bool = False) -> tuple[Tensor, Tensor]:
    """(loss sum, flat gradient) of a step over four micro-batches."""
    decoder, lora = load_tiny(folder, dropout=0.1, plan=plan, token_ids=IDS)
    batches = [packed_row([14, 1, 18], seed=k, first_row=k, vocabulary=VOCABULARY) for k in range(4)]
    walk = LayerWalk(decoder, lora, plan, reference=reference)
    loss = walk.accumulate(batches, seed=3, step=2, num_supervised=sum(len(b.supervised) for b in batches))
    rows = lora.token_rows(lora.gradient)
    assert rows[decoder.matrix_paths[0]].any() and rows[decoder.matrix_paths[-1]].abs().amax(1).all()
    evaluation = evaluated(decoder, batches, group_size=2, loss_tokens=plan.loss_tokens)
    decoder.close()
    return torch.stack([loss, evaluation]), lora.gradient


PLACES: dict[str, dict[str, Any]] = {
    "head and embedding in RAM": {"head": RAM, "embedding": RAM, "num_slots": 2},
    "all on disk": {"weights": (DISK,) * 3, "head": DISK, "embedding": DISK, "inputs": RAM, "num_slots": 2},
    "offloaded": {"activations": (OFFLOAD, RECOMPUTE, OFFLOAD)},
}


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_same_bits_from_anywhere(tmp_path: Path, family: str, places: str, reference: bool) -> None:
    folder = write_checkpoint(tmp_path, family)
    resident = resident_plan(KEEP, KEEP, KEEP)
    moved = replace(resident, **PLACES[places])
    for ours, theirs in zip(
        step(folder, moved, reference=reference), step(folder, resident, reference=reference), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_layers_below_the_first_adapted_one_are_gone_through(tmp_path: Path) -> None:
    """Gradients of rows do not depend on whether the first layers have LoRA parameters that add nothing."""
    folder = write_checkpoint(tmp_path)
    tokens = packed_row([21, 4, 30], vocabulary=VOCABULARY)
    found: list[Tensor] = []
    for is_adapted in (True, False):
        decoder, lora = load_tiny(folder, token_ids=IDS)
        for linear in (*decoder.linears_of(0), *decoder.linears_of(1)):
            lora.views(lora.working)[linear.name][1].zero_()
            linear.lora = linear.lora if is_adapted else None
        walk = LayerWalk(decoder, lora, resident_plan(KEEP, RECOMPUTE, KEEP), reference=False)
        walk.accumulate([tokens], seed=0, step=1, num_supervised=len(tokens.supervised))
        found.append(lora.token_rows(lora.gradient)[decoder.matrix_paths[0]])
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
