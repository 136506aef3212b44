"""The fused frozen linear against the formula in autograd: output and every gradient; what it saves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_train.kernels.dropout import DropoutKeys, dropout
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters

SHAPES = [(1, 6, 3, 1), (7, 5, 3, 2), (33, 48, 17, 4), (2, 130, 65, 8)]  # T, in, out, R
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SCALING, DROPOUT = 0.75, 0.3


class OneWeight:
    """A weight source that counts how often it is asked."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.num_asked = 0

    def dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        self.num_asked += 1
        return self.weight.to(dtype).clone()


class Case:
    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, bias: bool, p: float) -> None:
        self.num_tokens, num_in, num_out, rank = shape
        generator = torch.Generator().manual_seed(sum(shape))

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.source = OneWeight((randn(num_out, num_in) / num_in**0.5).to(dtype))
        self.linear = FrozenLinear("layer.proj", num_in, num_out)
        self.linear.source = self.source
        if bias:
            self.linear.bias = nn.Parameter(randn(num_out).to(dtype), requires_grad=False)
        self.lora = LoraParameters(
            {"layer.proj": self.linear},
            rank=rank,
            scaling=SCALING,
            dropout=p,
            seed=0,
            dtype=dtype,
            device="cpu",
        )
        self.lora.masters.copy_(randn(len(self.lora.masters)))
        self.lora.refresh_working()
        rows = torch.zeros(self.num_tokens, dtype=torch.int64)
        self.keys = DropoutKeys(seed=3, step=5, rows=rows, offsets=torch.arange(self.num_tokens))
        self.lora.dropout_context.tokens = self.keys
        self.x = randn(1, self.num_tokens, num_in).to(dtype)
        self.direction = randn(1, self.num_tokens, num_out).to(dtype)

    def run(self, reference: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(y, dL/dx, flat gradient) by one of the linear's two paths."""
        self.lora.gradient.zero_()
        self.linear.use_autograd = reference
        x = self.x.clone().requires_grad_()
        y = self.linear(x)
        y.backward(self.direction)
        if reference:
            self.linear.lora.collect_autograd()
        return y.detach(), x.grad, self.lora.gradient.clone()

    def formula(self, p: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, dx, dA, dB) in fp64 with plain autograd."""
        (a, b) = (t.double().requires_grad_() for t in self.lora.views(self.lora.working)["layer.proj"])
        x = self.x.double().requires_grad_()
        bias = None if self.linear.bias is None else self.linear.bias.double()
        branch = dropout(x, self.keys, 0, p) if p else x
        y = F.linear(x, self.source.weight.double(), bias) + SCALING * branch @ a.t() @ b.t()
        y.backward(self.direction.double())
        return y.detach(), x.grad, a.grad, b.grad


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-12))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, DROPOUT])
def test_output_and_every_gradient(shape, dtype, bias, p) -> None:
    case = Case(shape, dtype, bias, p)
    y, grad_input, da, db = case.formula(p)
    for reference in (False, True):
        case.source.num_asked = 0
        ours_y, ours_dx, flat = case.run(reference)
        ours_a, ours_b = case.lora.views(flat)["layer.proj"]
        assert ours_y.dtype == ours_dx.dtype == dtype and flat.dtype == torch.float32
        for ours, expected in ((ours_y, y), (ours_dx, grad_input), (ours_a, da), (ours_b, db)):
            assert relative(ours, expected) <= TOLERANCES[dtype], reference
        assert case.source.num_asked == (1 if reference else 2)  # fused: asked again in backward


def test_micro_batches_add_up_in_fp32() -> None:
    case = Case(SHAPES[2], torch.bfloat16, False, 0.0)
    _, _, once = case.run(reference=False)
    x = case.x.clone().requires_grad_()
    case.linear(x).backward(case.direction)  # a second time, on top
    assert torch.equal(case.lora.gradient, 2 * once)
    assert case.linear.lora.A.grad is None and case.linear.lora.B.grad is None


def saved_tensors(linear: FrozenLinear, x: Tensor) -> list[Tensor]:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(x)
    return saved


def test_the_fused_path_never_saves_the_weight() -> None:
    case = Case(SHAPES[2], torch.float32, True, DROPOUT)
    num_tokens, num_in, num_out, rank = SHAPES[2]
    x = case.x.requires_grad_()
    shapes = {tuple(t.shape[-2:]) for t in saved_tensors(case.linear, x)}
    assert shapes == {(num_tokens, num_in), (num_tokens, rank)}
    case.linear.use_autograd = True
    assert (num_in, num_out) in {
        tuple(sorted(t.shape[-2:], reverse=True)) for t in saved_tensors(case.linear, x)
    }


def test_without_factors_nothing_is_saved() -> None:
    source = OneWeight(torch.randn(5, 3))
    linear = FrozenLinear("layer.proj", 3, 5)
    linear.source = source
    x = torch.randn(2, 4, 3, requires_grad=True)
    assert saved_tensors(linear, x) == []
    y = linear(x)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y, x @ source.weight.t())
    torch.testing.assert_close(x.grad, torch.ones(2, 4, 5) @ source.weight)


def test_the_first_layer_needs_no_input_gradient() -> None:
    case = Case(SHAPES[2], torch.float32, False, 0.0)
    _, _, expected = case.run(reference=False)
    case.lora.gradient.zero_()
    case.source.num_asked = 0
    case.linear(case.x).backward(case.direction)  # x is no leaf that wants a gradient
    assert torch.equal(case.lora.gradient, expected)
    assert case.source.num_asked == 1


def test_nothing_is_dropped_in_evaluation() -> None:
    case = Case(SHAPES[2], torch.float32, False, DROPOUT)
    y_without_dropout = case.formula(0.0)[0]
    case.lora.dropout_context.tokens = None
    for case.linear.use_autograd in (False, True):
        assert relative(case.linear(case.x).detach(), y_without_dropout) <= 1e-5


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_skipped_value_is_zero_and_changes_no_gradient(p: float) -> None:
    case = Case((7, 12, 20, 3), torch.float32, bias=True, p=p)
    _, grad_input, gradient = case.run(reference=False)
    num_asked = case.source.num_asked
    case.lora.gradient.zero_()
    case.linear.skip_output = True
    y, skipped_dx, skipped_gradient = case.run(reference=False)
    assert y.count_nonzero() == 0 and y.shape == (1, 7, 20)
    assert torch.equal(skipped_dx, grad_input) and torch.equal(skipped_gradient, gradient)
    assert case.source.num_asked == num_asked + 1  # for dx only
