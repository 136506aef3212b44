"""The walk against autograd through transformers' own model: the same bits in reference mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import (
    autograd_gradients,
    flat,
    library_model,
    load_tiny,
    packed_row,
    resident_plan,
    write_checkpoint,
)
from torch import Tensor

from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.quant.formats import Quantization
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy

KEEP, RECOMPUTE = ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE
POLICIES = {
    "keep": (KEEP, KEEP, KEEP),
    "recompute": (RECOMPUTE, RECOMPUTE, RECOMPUTE),
    "mixed": (RECOMPUTE, KEEP, RECOMPUTE),
}


def walk(
    decoder: FrozenDecoder,
    lora: LoraParameters,
    batches: list[PackedTokens],
    policy: tuple[ActivationPolicy, ...],
    reference: bool,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    lora.gradient.zero_()
    num_supervised = sum(len(b.supervised) for b in batches)
    layer_walk = LayerWalk(decoder, lora, resident_plan(*policy), reference=reference)
    loss_sum = layer_walk.accumulate(batches, seed=0, step=1, num_supervised=num_supervised)
    return loss_sum, lora.views(lora.gradient.clone())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "quantization",
    [Quantization("nf4", True), Quantization("int8"), Quantization("none")],
    ids=lambda p: p.format,
)
def test_reference_is_bit_identical_to_autograd(
    tmp_path: Path, policy: str, dtype: torch.dtype, quantization: Quantization
) -> None:
    folder = write_checkpoint(tmp_path)
    decoder, lora = load_tiny(folder, quantization, dtype)
    tokens = packed_row([19, 1, 30, 14])
    model = library_model(folder, decoder, lora, dtype)
    loss, expected = autograd_gradients(model, lora, tokens, len(tokens.supervised))
    walked_loss, gradients = walk(decoder, lora, [tokens], POLICIES[policy], reference=True)
    assert torch.equal(walked_loss, loss)
    for name, pair in expected.items():
        for ours, theirs in zip(gradients[name], pair, strict=True):
            assert theirs.abs().max() > 0
            assert torch.equal(ours, theirs.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_micro_batches_are_the_fp32_sum(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path)
    decoder, lora = load_tiny(folder, dtype=dtype)
    batches = [packed_row([20, 12], seed=1), packed_row([32], seed=2), packed_row([5, 27], seed=3)]
    num_supervised = sum(len(b.supervised) for b in batches)
    model = library_model(folder, decoder, lora, dtype)
    total = torch.zeros_like(lora.gradient)
    for tokens in batches:
        _, pairs = autograd_gradients(model, lora, tokens, num_supervised)
        for name, views in lora.views(total).items():
            for view, gradient in zip(views, pairs[name], strict=True):
                view += gradient
    _, gradients = walk(decoder, lora, batches, POLICIES["mixed"], reference=True)
    for name, pair in lora.views(total).items():
        assert torch.equal(gradients[name][0], pair[0]) and torch.equal(gradients[name][1], pair[1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_linear_matches_the_reference(
    tmp_path: Path, policy: str, dtype: torch.dtype, tolerance: float, dropout: float
) -> None:
    folder = write_checkpoint(tmp_path)
    decoder, lora = load_tiny(folder, dtype=dtype, dropout=dropout)
    batches = [packed_row([19, 30, 14]), packed_row([40, 23], seed=5, first_row=1)]
    loss, expected = walk(decoder, lora, batches, POLICIES[policy], reference=True)
    fused_loss, gradients = walk(decoder, lora, batches, POLICIES[policy], reference=False)
    assert torch.allclose(fused_loss, loss, rtol=tolerance)
    difference = flat(gradients) - flat(expected)
    assert difference.norm() <= tolerance * flat(expected).norm()
    for name, pair in expected.items():
        for ours, theirs in zip(gradients[name], pair, strict=True):
            assert (ours - theirs).norm() <= 3 * tolerance * theirs.norm(), name


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_policies_give_the_same_bits(tmp_path: Path, reference: bool, dropout: float) -> None:
    decoder, lora = load_tiny(write_checkpoint(tmp_path), dtype=torch.bfloat16, dropout=dropout)
    batches = [packed_row([19, 30]), packed_row([49], seed=5, first_row=1)]
    results = [walk(decoder, lora, batches, policy, reference) for policy in POLICIES.values()]
    first_loss, _ = results[0]
    assert all(torch.equal(loss, first_loss) for loss, _ in results)
    keep, recompute, mixed = (flat(gradients) for _, gradients in results)
    assert torch.equal(keep, recompute) and torch.equal(keep, mixed)


def test_layers_below_the_first_factors_are_only_passed_through(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    decoder, _ = load_tiny(folder)
    chosen = {n: lin for n, lin in decoder.linears.items() if n.startswith("model.layers.1.mlp")}
    for linear in decoder.linears.values():
        linear.lora = None
    lora = LoraParameters(chosen, rank=4, scaling=2.0, dropout=0.0, seed=0, dtype=torch.float32, device="cpu")
    lora.masters.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    tokens = packed_row([24, 17])
    model = library_model(folder, decoder, lora, torch.float32)
    _, expected = autograd_gradients(model, lora, tokens, len(tokens.supervised))
    for policy in POLICIES.values():
        _, gradients = walk(decoder, lora, [tokens], policy, reference=True)
        assert all(torch.equal(gradients[n][0], expected[n][0]) for n in expected)
        assert all(torch.equal(gradients[n][1], expected[n][1]) for n in expected)
