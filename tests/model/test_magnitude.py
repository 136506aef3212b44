"""DoRA's row norms and magnitudes; gradients against PEFT's are in tests/parity/test_peft.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.device.compute import THE_CPU
from qlora_train.model import magnitude as module
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.quant.formats import Quantization
from qlora_train.walk.evaluate import loss_sum
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement

RECOMPUTE, KEEP = ActivationPolicy.RECOMPUTE, ActivationPolicy.KEEP
NF4 = Quantization("nf4")


def lora_of(linear: FrozenLinear, dtype: torch.dtype = torch.float32) -> LoraParameters:
    """LoRA parameters with a random B on one linear."""
    lora = LoraParameters(
        {"only": linear}, rank=4, scaling=0.5, dropout=0.0, seed=0, dtype=dtype, device="cpu", use_dora=True
    )
    lora.views(lora.masters)["only"][1].copy_(torch.randn(24, 4, generator=torch.Generator().manual_seed(1)))
    lora.refresh_working()
    return lora


def true_norms(weight: Tensor, lora: LoraParameters) -> Tensor:
    a, b, *_ = lora.views(lora.working.double())["only"]
    return (weight.double() + 0.5 * b @ a).norm(dim=1)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)], ids=str)
def test_row_norms_are_those_of_the_sum(
    dtype: torch.dtype, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks of 3 rows; computed again only after A and B have changed, and m is then left as it is."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 100)
    linear = FrozenLinear("only", 32, 24)
    lora = lora_of(linear, dtype)
    assert linear.lora is not None and linear.lora.magnitude is not None
    magnitude, (_, _, m) = linear.lora.magnitude, lora.views(lora.masters)["only"]
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = weight.clone()

    def refreshed() -> Tensor:
        magnitude.refresh(weight, linear.lora.A, linear.lora.B, 0.5)  # type: ignore[union-attr]
        return magnitude.row_norms.double()

    torch.testing.assert_close(refreshed(), true_norms(weight, lora), rtol=within, atol=0)
    assert torch.equal(weight, before) and torch.equal(m, magnitude.row_norms)
    first = m.clone()
    lora.views(lora.masters)["only"][0].mul_(3)
    assert torch.equal(refreshed().float(), first)
    lora.refresh_working()
    torch.testing.assert_close(refreshed(), true_norms(weight, lora), rtol=within, atol=0)
    assert torch.equal(m, first) and not torch.equal(magnitude.row_norms, first)


def walked(
    decoder: FrozenDecoder, lora: LoraParameters, plan: ExecutionPlan, reference: bool = False
) -> tuple[list[float], Tensor]:
    """Losses of three optimizer steps, and the masters after them."""
    optimizer = FlatOptimizer("adamw", lora, THE_CPU, lora_b_lr_ratio=1.0, weight_decay=0.0)
    walk = LayerWalk(decoder, lora, plan, reference=reference)
    losses = []
    for step in range(3):
        tokens = [packed_row([21, 4, 30], seed=2 * step + k) for k in range(2)]
        lora.gradient.zero_()
        losses.append(float(walk.accumulate(tokens, seed=0, step=step, num_supervised=90)))
        optimizer.step(0.01)
    losses.append(float(loss_sum(decoder, [packed_row([40], seed=9)])))
    return losses, lora.masters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_and_recomputed_give_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path, "llama")
    kept = resident_plan(*[KEEP] * 3)
    disk = {"weights": (Placement.DISK,) * 3, "num_slots": 2}
    runs = []
    for plan in (kept, resident_plan(*[RECOMPUTE] * 3), replace(kept, hold_dequantized=True, **disk)):
        decoder, lora = load_tiny(folder, NF4, dtype, plan=plan, use_dora=True)
        decoder.fuse(norms=True, mlps=True, qkv=True)
        runs.append(walked(decoder, lora, plan))
    for losses, masters in runs[1:]:
        assert losses == runs[0][0]
        assert torch.equal(masters, runs[0][1])
    assert torch.isfinite(runs[0][1]).all()


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
def test_a_tiled_mlp_gives_the_same_numbers(tmp_path: Path, reference: bool) -> None:
    folder = write_checkpoint(tmp_path, "llama")
    found = []
    for tile_tokens in (None, 16):
        plan = resident_plan(RECOMPUTE, KEEP, RECOMPUTE, mlp_tile_tokens=tile_tokens)
        decoder, lora = load_tiny(folder, NF4, plan=plan, use_dora=True)
        if not reference:
            decoder.fuse(norms=True, mlps=True, qkv=True)
        walk = LayerWalk(decoder, lora, plan, reference=reference)
        walk.accumulate([packed_row([21, 4, 30])], seed=0, step=0, num_supervised=40)
        found.append(lora.gradient.clone())
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()
    assert found[0].count_nonzero() > 0.9 * found[0].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_before_the_first_step_the_model_is_its_base(tmp_path: Path, dtype: torch.dtype) -> None:
    """To the bit, with B zero: m is the row norms, and what y is scaled by is exactly 1."""
    folder = write_checkpoint(tmp_path, "qwen2")
    losses = []
    for use_dora in (False, True):
        decoder, _ = load_tiny(folder, NF4, dtype)
        LoraParameters(
            decoder.linears, rank=4, scaling=2.0, dropout=0.0, seed=0, dtype=dtype, device="cpu",
            use_dora=use_dora,
        )  # fmt: skip
        losses.append(loss_sum(decoder, [packed_row([40])]))
    assert torch.equal(*losses)


def test_m_is_in_the_group_of_b_and_decays() -> None:
    """As PEFT's LoRA+ has it: 16 times the learning rate of A, the same weight decay."""
    lora = lora_of(FrozenLinear("only", 32, 24))
    lora.masters.normal_(generator=torch.Generator().manual_seed(3))
    lora.gradient.normal_(generator=torch.Generator().manual_seed(4))
    parts = zip(*(lora.views(flat)["only"] for flat in (lora.masters, lora.gradient)), strict=True)
    expected = []
    for (value, gradient), ratio in zip(parts, (1, 16, 16), strict=True):
        parameter = torch.nn.Parameter(value.clone())
        parameter.grad = gradient.clone()
        torch.optim.AdamW([parameter], lr=1e-3 * ratio, weight_decay=0.1).step()
        expected.append(parameter.data)
    FlatOptimizer("adamw", lora, THE_CPU, lora_b_lr_ratio=16.0, weight_decay=0.1).step(1e-3)
    for found, wanted in zip(lora.views(lora.masters)["only"], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
