"""Recurrent mixers over packed rows: dropout is that of each token; what cannot be run is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY_SIZE, load_tiny, resident_plan, write_checkpoint

from qlora_train.micro_batch import MicroBatch
from qlora_train.model.by_document import ByDocument
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.quant.formats import Quantization
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy

LENGTHS = [21, 5, 1, 34]


def row_of(documents: list[int]) -> PackedTokens:
    """These of the documents of LENGTHS, with the tokens and identities that they have in every row."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(3, VOCABULARY_SIZE, length) for length in LENGTHS]
    chosen = [tokens[i] for i in documents]
    labels = [np.append(t[1:], -100) for t in chosen]
    starts = np.cumsum([0, *LENGTHS])
    return PackedTokens.from_host(
        MicroBatch(
            token_ids=np.concatenate(chosen),
            position_ids=np.concatenate([np.arange(len(t)) for t in chosen]),
            labels=np.concatenate(labels),
            cu_seqlens=np.cumsum([0, *map(len, chosen)]),
            row_ids=np.zeros(sum(map(len, chosen))),
            token_offsets=np.concatenate([np.arange(starts[i], starts[i + 1]) for i in documents]),
        ),
        "cpu",
    )


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_with_dropout_documents_together_give_what_they_give_apart(tmp_path: Path, family: str) -> None:
    decoder, lora = load_tiny(write_checkpoint(tmp_path, family), Quantization("none"), dropout=0.3)
    plan = resident_plan(*[ActivationPolicy.RECOMPUTE] * len(decoder.layers))
    walk = LayerWalk(decoder, lora, plan, reference=False)
    found = []
    for rows in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        lora.gradient.zero_()
        loss = walk.accumulate([row_of(row) for row in rows], seed=3, step=1, num_supervised=60)
        found.append((loss, lora.gradient.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    assert (found[0][1] - found[1][1]).norm() <= 1e-4 * found[0][1].norm()


def test_without_documents_a_mixer_is_not_run(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path, "lfm2"), Quantization("none"))
    mixer = next(m for m in decoder.layers[0].modules() if isinstance(m, ByDocument))
    with pytest.raises(AssertionError, match="belong to documents"):
        mixer(torch.zeros(1, 3, 64))
