"""A head that bitsandbytes has packed, against transformers' own model of the checkpoint with it unpacked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    autograd_gradients,
    flat,
    library_model,
    load_tiny,
    pack_with_head,
    packed_row,
    resident_plan,
    write_checkpoint,
)

from qlora_train.infer.decoding import Sampling, generate_tokens
from qlora_train.infer.evaluate import loss_sum
from qlora_train.memory.execution import Activation, Place
from qlora_train.model.packed_matrix import PackedMatrix
from qlora_train.model.quantize import Packing
from qlora_train.train.walk import LayerWalk

PACKINGS = [Packing("nf4", True), Packing("nf4"), Packing("fp4", True), Packing("fp4"), Packing("int8")]
PLAN = resident_plan(*[Activation.RECOMPUTE] * 3)
V = 97  # tiles of 40 rows: the last has 17


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Packing, Path]:
    root = tmp_path_factory.mktemp("heads")
    plain = write_checkpoint(root / "plain", vocab_size=V)
    return {packing: pack_with_head(plain, root / str(packing), packing) for packing in PACKINGS}


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_loss_and_gradients(
    checkpoints: dict[Packing, Path], packing: Packing, dtype: torch.dtype, tolerance: float
) -> None:
    decoder, factors = load_tiny(checkpoints[packing], packing, dtype)
    assert isinstance(decoder.head, PackedMatrix)
    tokens = packed_row([19, 1, 30, 14])
    num_supervised = len(tokens.supervised)
    model = library_model(checkpoints[packing], decoder, factors, dtype)
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.dtype == dtype
    loss, expected = autograd_gradients(model, factors, tokens, num_supervised)
    for reference in (True, False):
        factors.gradient.zero_()
        walk = LayerWalk(decoder, factors, PLAN, reference=reference)
        walked = walk.accumulate([tokens], seed=0, step=1, num_supervised=num_supervised)
        gradients = factors.views(factors.gradient)
        if reference:
            assert torch.equal(walked, loss)
            for name, pair in expected.items():
                for ours, theirs in zip(gradients[name], pair, strict=True):
                    assert theirs.abs().max() > 0 and torch.equal(ours, theirs.float()), name
        else:
            assert torch.allclose(walked, loss, rtol=tolerance)
            difference = flat(gradients) - flat(expected)
            assert difference.norm() <= tolerance * flat(expected).norm()


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("head", [Place.RESIDENT, Place.DISK])
@torch.no_grad()
def test_evaluation_and_generation(checkpoints: dict[Packing, Path], packing: Packing, head: Place) -> None:
    folder = checkpoints[packing]
    plan = replace(PLAN, head=head, num_slots=0 if head is Place.RESIDENT else 2)
    decoder, factors = load_tiny(folder, packing, plan=plan)
    model = library_model(folder, decoder, factors, torch.float32, attention="eager")
    prompt = [5, 9, 7, 30]
    (answer,) = generate_tokens(decoder, [prompt], Sampling(6), frozenset())
    tokens = list(prompt)
    for token in answer:
        assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)
    assert len(answer) == 6 and len(set(answer)) > 1
    row = packed_row([33])
    logits = model(row.token_ids).logits[0]
    expected = F.cross_entropy(logits, row.labels, ignore_index=-100, reduction="sum")
    assert torch.allclose(loss_sum(decoder, [row]), expected, rtol=1e-5)
    decoder.close()
