"""Evaluation in groups: the same bits as one micro-batch at a time, and a layer is fetched once per group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint

from qlora_train.walk.evaluate import loss_sum, token_scores
from qlora_train.weights.execution_plan import ActivationPolicy, Placement
from qlora_train.weights.streaming import StreamedWeights

NUM_LAYERS, KEEP = 4, ActivationPolicy.KEEP
BATCHES = [packed_row([14, 1, 18 + k], seed=k) for k in range(8)]


def test_groups_change_no_bit_and_fetch_each_layer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    folder = write_checkpoint(tmp_path / "base", num_hidden_layers=NUM_LAYERS)
    plan = resident_plan(*(KEEP,) * NUM_LAYERS, weights=(Placement.DISK,) * NUM_LAYERS, num_slots=1)
    decoder, _ = load_tiny(folder, plan=plan)
    assert isinstance(decoder.weights, StreamedWeights)
    ring, found = decoder.weights.ring, {}
    for size in (1, 3, 8):
        before = ring.num_reads
        loss = loss_sum(decoder, iter(BATCHES), group_size=size, loss_tokens=16)
        between = ring.num_reads
        scores = list(token_scores(decoder, iter(BATCHES), group_size=size, loss_tokens=16))
        reads = between - before, ring.num_reads - between
        assert all(abs(n - NUM_LAYERS * -(-len(BATCHES) // size)) <= 1 for n in reads), (size, reads)
        found[size] = loss, torch.cat([one.losses for one in scores])
    decoder.close()
    for loss, scores in found.values():
        assert torch.equal(loss, found[1][0]) and torch.equal(scores, found[1][1])
