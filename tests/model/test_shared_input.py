"""q, k and v as one operation against the three linears: outputs, every gradient, what is saved, order of
calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_train.kernels.dropout import DropoutKeys
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.shared_input import QKV, SharedLinear, fuse_qkv

SHAPES = [(1, 3, (5, 2, 2), 1), (7, 6, (11, 4, 4), 2), (33, 48, (80, 16, 24), 4)]  # T, D, widths, R
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class CountingWeights:
    """Hands weights out, and counts how often."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights, self.num_dequantized = weights, 0

    def dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        self.num_dequantized += 1
        return self.weights[name]


class Case:
    """The same three linears called one by one, as they are and fused."""

    def __init__(
        self,
        shape: tuple[int, int, tuple[int, int, int], int] = SHAPES[1],
        dtype: torch.dtype = torch.float32,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        targets: tuple[str, ...] = QKV,
    ) -> None:
        num_tokens, hidden, widths, rank = shape
        generator = torch.Generator().manual_seed(hidden)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        sizes = dict(zip(QKV, widths, strict=True))
        self.source = CountingWeights({n: random(w, hidden) / hidden**0.5 for n, w in sizes.items()})
        linears = {}
        for name, width in sizes.items():
            linears[name] = FrozenLinear(name, hidden, width)
            linears[name].source = self.source  # type: ignore[assignment]  # all that is used of a source
            if bias:
                linears[name].bias = nn.Parameter(random(width), requires_grad=False)
        self.lora = None
        if targets:
            options: dict[str, Any] = {"rank": rank, "scaling": 0.75, "dropout": dropout, "seed": 0}
            chosen = {name: linears[name] for name in targets}
            self.lora = LoraParameters(chosen, dtype=dtype, device="cpu", **options)
            self.lora.masters.normal_(generator=generator)
            self.lora.refresh_working()
            rows = torch.zeros(num_tokens, dtype=torch.int64)
            self.lora.dropout_context.tokens = DropoutKeys(3, 5, rows, torch.arange(num_tokens))
        self.plain = SimpleNamespace(**linears)
        self.fused = SimpleNamespace(**linears)
        fuse_qkv([SimpleNamespace(self_attn=self.fused)])  # type: ignore[list-item]
        self.x = random(1, num_tokens, hidden)
        self.directions = [random(1, num_tokens, width) for width in widths]

    def run(self, attention: Any, *, needs_dx: bool = True, order: tuple[str, ...] = QKV) -> list[Tensor]:
        """The three outputs, dL/dx, the flat gradient of the factors."""
        if self.lora is not None:
            self.lora.gradient.zero_()
        x = self.x.clone().requires_grad_(needs_dx)
        called = {name: getattr(attention, name)(x) for name in order}
        ys = [called[name] for name in QKV]
        torch.autograd.backward(ys, self.directions)
        gradient = torch.zeros(1) if self.lora is None else self.lora.gradient.clone()
        return [*(y.detach() for y in ys), torch.zeros(1) if x.grad is None else x.grad, gradient]

    def check(self, **options: Any) -> None:
        pairs = zip(self.run(self.plain, **options), self.run(self.fused, **options), strict=True)
        for expected, found in pairs:
            assert found.shape == expected.shape and found.dtype == expected.dtype
            scale = expected.double().abs().max().clamp(1e-30)
            assert (expected.double() - found.double()).abs().max() <= TOLERANCES[self.x.dtype] * scale


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_every_gradient(shape: Any, dtype: torch.dtype, dropout: float) -> None:
    Case(shape, dtype, dropout=dropout).check()


@pytest.mark.parametrize("targets", [(), ("q_proj",), ("v_proj",), ("q_proj", "v_proj")], ids=str)
def test_linears_without_factors(targets: tuple[str, ...]) -> None:
    Case(targets=targets, bias=True).check()


def test_an_input_that_needs_no_gradient() -> None:
    Case().check(needs_dx=False)


@pytest.mark.parametrize("order", [("v_proj", "q_proj", "k_proj"), QKV], ids=str)
def test_in_any_order_of_calls(order: tuple[str, ...]) -> None:
    Case(bias=True).check(order=order)


def test_each_weight_is_dequantized_once_on_each_way() -> None:
    case = Case()
    case.run(case.fused)
    assert case.source.num_dequantized == 6


def test_what_is_saved() -> None:
    """x once, and the three low-rank products as one."""
    num_tokens, hidden, _, rank = SHAPES[2]
    case = Case(SHAPES[2])
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = case.x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for name in QKV:
            getattr(case.fused, name)(x)
    assert [tuple(t.shape) for t in saved] == [(1, num_tokens, hidden), (num_tokens, 3 * rank)]


def test_another_input_or_a_second_call_is_computed_anew() -> None:
    case = Case()
    first, second = case.x, case.x + 1
    with torch.no_grad():
        case.fused.q_proj(first)
        case.fused.k_proj(first)
        for x in (second, first, first):
            for name in ("q_proj", "q_proj", "v_proj", "k_proj"):
                torch.testing.assert_close(getattr(case.fused, name)(x), getattr(case.plain, name)(x))


def test_nothing_is_held_between_layers() -> None:
    case = Case()
    for name in QKV:
        getattr(case.fused, name)(case.x)
    together = case.fused.q_proj.together
    assert together._x is None and together._ys == []


def test_what_nobody_took_is_forgotten() -> None:
    case = Case()
    case.fused.q_proj(case.x)
    together = case.fused.q_proj.together
    assert together._x is case.x
    together.forget()
    assert together._x is None and together._ys == []


def test_factors_in_another_order_are_taken_one_by_one() -> None:
    """An adapter's file has them by name: k, q, v."""
    Case(targets=tuple(sorted(QKV))).check()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_linears(family: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    for layer in model.model.layers:
        for name in QKV:
            plain = getattr(layer.self_attn, name, None)
            if plain is not None:
                linear = FrozenLinear(name, plain.in_features, plain.out_features)
                setattr(layer.self_attn, name, linear)
    before = sum(isinstance(m, FrozenLinear) for m in model.modules())
    fuse_qkv(model.model.layers)
    assert sum(isinstance(m, FrozenLinear) for m in model.modules()) == before
    assert sum(isinstance(m, SharedLinear) for m in model.modules()) == before
