"""The optimizers on the flat masters: the library's own values, and a state that goes on to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_train.device.compute import THE_CPU
from qlora_train.errors import UserError
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.walk import optimizer as optimizer_module
from qlora_train.walk.optimizer import FlatOptimizer

NAMES = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
SIZES = (160, 96)  # A and B both above the 4,096 elements from which bitsandbytes keeps 8-bit state


def make_lora(dtype: torch.dtype = torch.float32) -> LoraParameters:
    linears = {f"layer{i}": FrozenLinear(f"layer{i}", *SIZES) for i in range(3)}
    lora = LoraParameters(linears, rank=16, scaling=1.0, dropout=0.0, seed=0, dtype=dtype, device="cpu")
    lora.masters[lora.first_b :] = 0.1
    return lora


def make(name: str, lora: LoraParameters, ratio: float = 1.0, weight_decay: float = 0.01) -> FlatOptimizer:
    return FlatOptimizer(name, lora, THE_CPU, lora_b_lr_ratio=ratio, weight_decay=weight_decay)


def run(optimizer: FlatOptimizer, lora: LoraParameters, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        lora.gradient.copy_(torch.randn(lora.gradient.shape, generator=generator))
        optimizer.step(1e-3 * (step + 1))


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_goes_on_to_the_bit(name: str, ratio: float) -> None:
    straight = make_lora()
    run(make(name, straight, ratio), straight, range(9))

    before = make_lora()
    first = make(name, before, ratio)
    run(first, before, range(4))
    saved = {key: value.clone() for key, value in first.state().items()}
    after = make_lora()
    after.masters.copy_(before.masters)
    second = make(name, after, ratio)
    second.load_state(saved)
    assert second.state().keys() == saved.keys()
    assert all(torch.equal(second.state()[key], value) for key, value in saved.items())
    run(second, after, range(4, 9))
    assert torch.equal(after.masters, straight.masters)
    assert all(torch.equal(second.state()[key], value) for key, value in saved.items() if "qmap" in key)

    forgetful = make_lora()
    forgetful.masters.copy_(before.masters)
    run(make(name, forgetful, ratio), forgetful, range(4, 9))
    assert not torch.equal(forgetful.masters, straight.masters)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_8_bit_optimizers_have_8_bit_moments(name: str) -> None:
    lora = make_lora()
    optimizer = make(name, lora)
    assert optimizer.state() == {}
    run(optimizer, lora, range(1))
    moments = [v for v in optimizer.state().values() if v.numel() == lora.masters.numel()]
    wanted = torch.uint8 if "8bit" in name else torch.float32
    assert [moment.dtype for moment in moments] == [wanted, wanted]


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_state_in_managed_memory_is_counted(name: str) -> None:
    lora = make_lora()
    optimizer = make(name, lora)
    run(optimizer, lora, range(1))
    assert optimizer.managed_bytes == 0  # no such memory without CUDA
    moments = [value for key, value in optimizer.state().items() if ".state" in key]
    for state in optimizer._optimizer.state.values():
        state["state1"].is_paged = state["state2"].is_paged = True  # as bitsandbytes does
    assert optimizer.managed_bytes == sum(moment.nbytes for moment in moments)
    assert optimizer.managed_bytes == (8 if name.endswith("32bit") else 2) * lora.masters.numel()


def test_adamw_is_torchs_on_the_flat_vector() -> None:
    lora = make_lora()
    expected = nn.Parameter(lora.masters.clone())
    library = torch.optim.AdamW([expected], weight_decay=0.01)
    optimizer = make("adamw", lora)
    for step in range(5):
        run(optimizer, lora, range(step, step + 1))
        expected.grad = lora.gradient.clone()
        library.param_groups[0]["lr"] = 1e-3 * (step + 1)
        library.step()
    assert torch.equal(lora.masters, expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_is_adamw(name: str) -> None:
    """8-bit moments are within 5 % of the path of exact ones, 32-bit moments within rounding."""
    start, exact, lora = make_lora().masters, make_lora(), make_lora()
    run(make("adamw", exact), exact, range(6))
    run(make(name, lora), lora, range(6))
    moved = (exact.masters - start).norm()
    assert moved > 0.1
    assert (lora.masters - exact.masters).norm() <= (0.05 if "8bit" in name else 1e-5) * moved


def test_lora_plus_gives_b_its_own_rate() -> None:
    lora = make_lora()
    num_a, ratio = lora.first_b, 16.0
    a = nn.Parameter(lora.masters[:num_a].clone())
    b = nn.Parameter(lora.masters[num_a:].clone())
    slow, fast = torch.optim.AdamW([a], weight_decay=0.01), torch.optim.AdamW([b], weight_decay=0.01)
    optimizer = make("adamw", lora, ratio)
    for step in range(3):
        run(optimizer, lora, range(step, step + 1))
        a.grad, b.grad = lora.gradient[:num_a].clone(), lora.gradient[num_a:].clone()
        slow.param_groups[0]["lr"] = 1e-3 * (step + 1)
        fast.param_groups[0]["lr"] = 1e-3 * (step + 1) * ratio
        slow.step()
        fast.step()
    assert torch.equal(lora.masters[:num_a], a)
    assert torch.equal(lora.masters[num_a:], b)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_shrinks_the_masters_by_rate_times_decay(name: str) -> None:
    lora = make_lora()
    before = lora.masters.clone()
    optimizer = make(name, lora, weight_decay=0.5)
    lora.gradient.zero_()
    optimizer.step(0.1)
    torch.testing.assert_close(lora.masters, before * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)


def test_a_step_refreshes_the_working_copy_and_keeps_the_gradient() -> None:
    lora = make_lora(torch.bfloat16)
    optimizer = make("adamw", lora)
    run(optimizer, lora, range(1))
    assert torch.equal(lora.working, lora.masters.to(torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(lora.gradient, torch.randn(lora.gradient.shape, generator=generator))


@pytest.mark.parametrize(("saved_by", "loaded_by"), [("adamw", "adamw_8bit"), ("paged_adamw_8bit", "adamw")])
def test_another_optimizers_state_is_refused(saved_by: str, loaded_by: str) -> None:
    lora = make_lora()
    optimizer = make(saved_by, lora)
    run(optimizer, lora, range(1))
    with pytest.raises(UserError, match="another optimizer"):
        make(loaded_by, make_lora()).load_state(optimizer.state())


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit"])
def test_slices_change_no_bit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    results = []
    for slice_elements in (4096, 2**20):
        monkeypatch.setattr(optimizer_module, "CPU_SLICE_ELEMENTS", slice_elements)
        lora = make_lora()
        optimizer = make(name, lora)
        for step in range(3):
            lora.gradient.normal_(0, 1, generator=torch.Generator().manual_seed(step))
            optimizer.step(1e-2)
        results.append((lora.masters, len(optimizer.state())))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] > results[1][1]  # there were several slices
