"""Flat buffers, their views and the initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlora_train.errors import BaseModelError
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters

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
    return LoraParameters(attached, rank=RANK, scaling=2.0, dropout=0.0, seed=seed, dtype=dtype, device="cpu")


def test_layout_is_every_a_then_every_b() -> None:
    lora = buffers(linears())
    num_a = sum(RANK * i for i, _ in SIZES.values())
    num_b = sum(RANK * o for _, o in SIZES.values())
    assert (lora.first_b, len(lora.masters)) == (num_a, num_a + num_b)
    numbered = torch.arange(num_a + num_b, dtype=torch.float32)
    views = lora.views(numbered)
    assert list(views) == list(SIZES)
    for name, (a, b) in views.items():
        assert a.shape == (RANK, SIZES[name][0]) and b.shape == (SIZES[name][1], RANK)
    in_order = [a for a, _ in views.values()] + [b for _, b in views.values()]
    assert torch.equal(torch.cat([part.flatten() for part in in_order]), numbered)


def test_modules_hold_views_of_the_buffers() -> None:
    attached = linears()
    lora = buffers(attached)
    lora.working.fill_(5.0)
    lora.gradient.fill_(7.0)
    for number, linear in enumerate(attached.values()):
        module = linear.lora
        assert module.module_id == number and module.context is lora.dropout_context
        assert module.A.dtype == torch.bfloat16 and (module.A == 5).all() and (module.B == 5).all()
        assert (module.gradient_a == 7).all() and (module.gradient_b == 7).all()
        module.add_gradients(torch.ones_like(module.gradient_a), torch.ones_like(module.gradient_b))
    assert (lora.gradient == 8.0).all()


def test_in_fp32_the_working_copy_is_the_masters() -> None:
    attached = linears()
    lora = buffers(attached, torch.float32)
    assert lora.working is lora.masters
    lora.masters.fill_(3.0)
    assert all((linear.lora.B == 3).all() for linear in attached.values())


def test_refresh_casts_the_masters() -> None:
    lora = buffers(linears())
    lora.masters.copy_(torch.linspace(-1, 1, len(lora.masters)))
    lora.refresh_working()
    assert torch.equal(lora.working, lora.masters.bfloat16())


def test_initialised_as_peft_does() -> None:
    lora = buffers(linears())
    for name, (a, b) in lora.views(lora.masters).items():
        bound = 1 / math.sqrt(SIZES[name][0])
        assert b.count_nonzero() == 0
        assert a.abs().max() <= bound
        assert a.abs().max() > 0.8 * bound
    wide, _ = lora.views(lora.masters)["model.layers.1.mlp.up_proj"]
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
    lora, adapter = buffers(linears()), random_adapter()
    lora.load(dict(reversed(adapter.items())))
    for name, (a, b) in lora.views(lora.masters).items():
        assert torch.equal(a, adapter[name][0]) and torch.equal(b, adapter[name][1])
    assert torch.equal(lora.working, lora.masters.bfloat16())


def test_load_refuses_another_selection_or_shape() -> None:
    lora, adapter = buffers(linears()), random_adapter()
    before = lora.masters.clone()
    lacking = {name: pair for name, pair in adapter.items() if "layers.1.mlp" not in name}
    with pytest.raises(
        BaseModelError, match=r"lacks \['model.layers.1.mlp.up_proj'\] and has nothing besides"
    ):
        lora.load(lacking)
    with pytest.raises(BaseModelError, match=r"lacks nothing and has \['model.layers.9.proj'\]"):
        lora.load(adapter | {"model.layers.9.proj": next(iter(adapter.values()))})
    assert torch.equal(lora.masters, before)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(BaseModelError, match=rf"{name} A is \(5, 12\), this run needs \(3, 12\)"):
        lora.load(adapter | {name: (torch.zeros(5, 12), torch.zeros(7, 5))})
