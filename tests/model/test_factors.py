"""Flat buffers, their views, the initialisation and the selection of targets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlora_train.errors import BaseModelError
from qlora_train.model.factors import FactorBuffers, select_targets
from qlora_train.model.linear import FrozenLinear

SIZES = {
    "model.layers.0.self_attn.q_proj": (12, 20),
    "model.layers.0.mlp.up_proj": (12, 7),
    "model.layers.1.self_attn.q_proj": (12, 20),
    "model.layers.1.mlp.up_proj": (300, 7),
}
RANK = 3


def linears() -> dict[str, FrozenLinear]:
    return {name: FrozenLinear(name, i, o) for name, (i, o) in SIZES.items()}


def buffers(attached: dict[str, FrozenLinear], dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    return FactorBuffers(attached, rank=RANK, scaling=2.0, dropout=0.0, seed=seed, dtype=dtype, device="cpu")


def test_layout_is_every_a_then_every_b() -> None:
    factors = buffers(linears())
    num_a = sum(RANK * i for i, _ in SIZES.values())
    num_b = sum(RANK * o for _, o in SIZES.values())
    assert (factors.num_a, len(factors.masters)) == (num_a, num_a + num_b)
    numbered = torch.arange(num_a + num_b, dtype=torch.float32)
    views = factors.views(numbered)
    assert list(views) == list(SIZES)
    for name, (a, b) in views.items():
        assert a.shape == (RANK, SIZES[name][0]) and b.shape == (SIZES[name][1], RANK)
    in_order = [a for a, _ in views.values()] + [b for _, b in views.values()]
    assert torch.equal(torch.cat([part.flatten() for part in in_order]), numbered)


def test_modules_hold_views_of_the_buffers() -> None:
    attached = linears()
    factors = buffers(attached)
    factors.working.fill_(5.0)
    factors.gradient.fill_(7.0)
    for number, linear in enumerate(attached.values()):
        lora = linear.factors
        assert lora.module_id == number and lora.context is factors.dropout_context
        assert lora.A.dtype == torch.bfloat16 and (lora.A == 5).all() and (lora.B == 5).all()
        assert (lora.gradient_a == 7).all() and (lora.gradient_b == 7).all()
        lora.add_gradients(torch.ones_like(lora.gradient_a), torch.ones_like(lora.gradient_b))
    assert (factors.gradient == 8.0).all()
    assert factors.modules(attached.values()) == [linear.factors for linear in attached.values()]


def test_in_fp32_the_working_copy_is_the_masters() -> None:
    attached = linears()
    factors = buffers(attached, torch.float32)
    assert factors.working is factors.masters
    factors.masters.fill_(3.0)
    assert all((linear.factors.B == 3).all() for linear in attached.values())


def test_refresh_casts_the_masters() -> None:
    factors = buffers(linears())
    factors.masters.copy_(torch.linspace(-1, 1, len(factors.masters)))
    factors.refresh_working()
    assert torch.equal(factors.working, factors.masters.bfloat16())


def test_initialised_as_peft_does() -> None:
    factors = buffers(linears())
    for name, (a, b) in factors.views(factors.masters).items():
        bound = 1 / math.sqrt(SIZES[name][0])
        assert b.count_nonzero() == 0
        assert a.abs().max() <= bound
        assert a.abs().max() > 0.8 * bound
    wide, _ = factors.views(factors.masters)["model.layers.1.mlp.up_proj"]
    assert wide.std().item() == pytest.approx(1 / math.sqrt(3 * 300), rel=0.05)  # uniform
    assert abs(wide.mean()) < 3 / math.sqrt(3 * 300) / math.sqrt(wide.numel())


def test_the_seed_decides() -> None:
    first, second, other = buffers(linears()), buffers(linears()), buffers(linears(), seed=1)
    assert torch.equal(first.masters, second.masters)
    assert not torch.equal(first.masters, other.masters)
    torch.manual_seed(1234)  # the global generator plays no part
    assert torch.equal(buffers(linears()).masters, first.masters)


def random_adapter() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(RANK, i, generator=generator), torch.randn(o, RANK, generator=generator))
        for name, (i, o) in SIZES.items()
    }


def test_load_sets_masters_and_working() -> None:
    factors, adapter = buffers(linears()), random_adapter()
    factors.load(dict(reversed(adapter.items())))
    for name, (a, b) in factors.views(factors.masters).items():
        assert torch.equal(a, adapter[name][0]) and torch.equal(b, adapter[name][1])
    assert torch.equal(factors.working, factors.masters.bfloat16())


def test_load_refuses_another_selection_or_shape() -> None:
    factors, adapter = buffers(linears()), random_adapter()
    before = factors.masters.clone()
    lacking = {name: pair for name, pair in adapter.items() if "layers.1.mlp" not in name}
    with pytest.raises(
        BaseModelError, match=r"lacks \['model.layers.1.mlp.up_proj'\] and has nothing besides"
    ):
        factors.load(lacking)
    with pytest.raises(BaseModelError, match=r"lacks nothing and has \['model.layers.9.proj'\]"):
        factors.load(adapter | {"model.layers.9.proj": next(iter(adapter.values()))})
    assert torch.equal(factors.masters, before)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(BaseModelError, match=rf"{name} A is \(5, 12\), this run needs \(3, 12\)"):
        factors.load(adapter | {name: (torch.zeros(5, 12), torch.zeros(7, 5))})


def test_select_targets() -> None:
    everything = linears()
    assert select_targets(everything, "all-linear") == everything
    up = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert list(select_targets(everything, ["up_proj"])) == up
    assert list(select_targets(everything, ["mlp.up_proj"])) == up
    assert (
        list(select_targets(everything, ["layers.1.mlp.up_proj", "q_proj"]))
        == list(SIZES)[:1] + list(SIZES)[2:]
    )


def test_a_target_that_matches_nothing_lists_what_exists() -> None:
    with pytest.raises(BaseModelError) as caught:
        select_targets(linears(), ["q_proj", "p_proj", "proj"])  # "proj" is no whole name
    message = str(caught.value)
    assert "lora.target_modules: p_proj, proj matches no linear layer" in message
    assert "it has mlp.up_proj, self_attn.q_proj" in message
