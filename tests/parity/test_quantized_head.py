"""A head that bitsandbytes has quantized, against transformers' own model of the checkpoint with it
dequantized."""

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
    packed_row,
    quantize_with_head,
    resident_plan,
    write_checkpoint,
)

from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.sampling import Sampling
from qlora_train.model.quantized_matrix import QuantizedMatrix
from qlora_train.quant.formats import Quantization
from qlora_train.walk.evaluate import loss_sum
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy, Placement

QUANTIZATIONS = [
    Quantization("nf4", True),
    Quantization("nf4"),
    Quantization("fp4", True),
    Quantization("fp4"),
    Quantization("int8"),
]
PLAN = resident_plan(*[ActivationPolicy.RECOMPUTE] * 3)
V = 97  # tiles of 40 rows: the last has 17


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Quantization, Path]:
    root = tmp_path_factory.mktemp("heads")
    plain = write_checkpoint(root / "plain", vocab_size=V)
    return {
        quantization: quantize_with_head(plain, root / str(quantization), quantization)
        for quantization in QUANTIZATIONS
    }


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_loss_and_gradients(
    checkpoints: dict[Quantization, Path], quantization: Quantization, dtype: torch.dtype, tolerance: float
) -> None:
    decoder, lora = load_tiny(checkpoints[quantization], quantization, dtype)
    assert isinstance(decoder.head, QuantizedMatrix)
    tokens = packed_row([19, 1, 30, 14])
    num_supervised = len(tokens.supervised)
    model = library_model(checkpoints[quantization], decoder, lora, dtype)
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.dtype == dtype
    loss, expected = autograd_gradients(model, lora, tokens, num_supervised)
    for reference in (True, False):
        lora.gradient.zero_()
        walk = LayerWalk(decoder, lora, PLAN, reference=reference)
        walked = walk.accumulate([tokens], seed=0, step=1, num_supervised=num_supervised)
        gradients = lora.views(lora.gradient)
        if reference:
            assert torch.equal(walked, loss)
            for name, pair in expected.items():
                for ours, theirs in zip(gradients[name], pair, strict=True):
                    assert theirs.abs().max() > 0 and torch.equal(ours, theirs.float()), name
        else:
            assert torch.allclose(walked, loss, rtol=tolerance)
            difference = flat(gradients) - flat(expected)
            assert difference.norm() <= tolerance * flat(expected).norm()


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize("head", [Placement.DEVICE, Placement.DISK])
@torch.no_grad()
def test_evaluation_and_generation(
    checkpoints: dict[Quantization, Path], quantization: Quantization, head: Placement
) -> None:
    folder = checkpoints[quantization]
    plan = replace(PLAN, head=head, num_slots=0 if head is Placement.DEVICE else 2)
    decoder, lora = load_tiny(folder, quantization, plan=plan)
    model = library_model(folder, decoder, lora, torch.float32, attention="eager")
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
