"""A layer's fused parts against the modules they stand for: output, every gradient, what is saved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from qlora_train.device.description import MAX_LIGER_COLUMNS
from qlora_train.kernels.dropout import DropoutKeys
from qlora_train.kernels.liger import Liger
from qlora_train.model.fused import FusedMlp, FusedNorm, fuse_mlps, fuse_norms
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters

SHAPES = [(1, 3, 5, 1), (7, 6, 11, 2), (33, 48, 80, 4)]  # T, D, I, R
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAMES = ("gate_proj", "up_proj", "down_proj")


class Weights:
    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.weights[name]


class PlainMlp(nn.Module):
    """As the library writes it."""

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, activation: str, bias: bool
    ) -> None:
        super().__init__()
        _, hidden, inner, _ = shape
        generator = torch.Generator().manual_seed(sum(shape))
        sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        source = Weights(
            {n: (torch.randn(s, generator=generator) / s[1] ** 0.5).to(dtype) for n, s in sizes.items()}
        )
        for name, (num_out, num_in) in sizes.items():
            linear = FrozenLinear(name, num_in, num_out)
            linear.source = source  # type: ignore[assignment]  # all that is used of a source
            if bias:
                values = torch.randn(num_out, generator=generator).to(dtype)
                linear.bias = nn.Parameter(values, requires_grad=False)
            setattr(self, name, linear)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Case:
    """A plain and a fused MLP over the same linears."""

    def __init__(
        self,
        shape: tuple[int, int, int, int] = SHAPES[1],
        dtype: torch.dtype = torch.float32,
        activation: str = "silu",
        bias: bool = False,
        dropout: float = 0.0,
        targets: tuple[str, ...] = NAMES,
    ) -> None:
        num_tokens, hidden, _, rank = shape
        generator = torch.Generator().manual_seed(1)
        self.plain = PlainMlp(shape, dtype, activation, bias)
        self.fused = FusedMlp(self.plain)
        linears = {name: getattr(self.plain, name) for name in targets}
        self.lora = None
        if linears:
            options: dict[str, Any] = {"rank": rank, "scaling": 0.75, "dropout": dropout, "seed": 0}
            self.lora = LoraParameters(linears, dtype=dtype, device="cpu", **options)
            self.lora.masters.normal_(generator=generator)
            self.lora.refresh_working()
            rows = torch.zeros(num_tokens, dtype=torch.int64)
            self.lora.dropout_context.tokens = DropoutKeys(3, 5, rows, torch.arange(num_tokens))
        self.x, self.direction = (
            torch.randn(1, num_tokens, hidden, generator=generator).to(dtype) for _ in range(2)
        )

    def run(self, mlp: nn.Module, *, x_needs_gradient: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(y, dL/dx, flat gradient of the factors)."""
        if self.lora is not None:
            self.lora.gradient.zero_()
        x = self.x.clone().requires_grad_(x_needs_gradient)
        y = mlp(x)
        y.backward(self.direction)
        gradient = torch.zeros(1) if self.lora is None else self.lora.gradient.clone()
        return y.detach(), torch.zeros(1) if x.grad is None else x.grad, gradient

    def check(self) -> None:
        for expected, found in zip(self.run(self.plain), self.run(self.fused), strict=True):
            worst = (expected.double() - found.double()).abs().max() / expected.double().abs().max().clamp(
                1e-30
            )
            assert worst <= TOLERANCES[self.x.dtype]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_every_gradient(
    shape: tuple[int, int, int, int], dtype: torch.dtype, activation: str, dropout: float
) -> None:
    Case(shape, dtype, activation, dropout=dropout).check()


@pytest.mark.parametrize("targets", [(), ("down_proj",), ("gate_proj",), ("up_proj", "down_proj")], ids=str)
def test_linears_without_factors(targets: tuple[str, ...]) -> None:
    Case(targets=targets, bias=True).check()


def test_an_input_that_needs_no_gradient() -> None:
    case = Case()
    *_, expected = case.run(case.plain, x_needs_gradient=False)
    *_, found = case.run(case.fused, x_needs_gradient=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_skipping_the_value_changes_no_gradient() -> None:
    case = Case(dropout=0.2)
    y, *expected = case.run(case.fused)
    case.fused.down_proj.skip_output = True
    skipped, *found = case.run(case.fused)
    assert not torch.equal(y, skipped) and not skipped.any()
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_what_is_saved() -> None:
    num_tokens, hidden, inner, rank = SHAPES[2]
    case = Case(SHAPES[2], torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.fused(case.x.requires_grad_())
    assert sum(t.nbytes for t in saved) == 2 * num_tokens * (hidden + 2 * inner + 2 * rank)


def layers_of(family: str) -> nn.ModuleList:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.bfloat16)
    layers = model.get_decoder().layers
    for parameter in layers.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return layers


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "olmo2"])
def test_norms_that_are_the_same_to_the_bit_are_replaced(family: str) -> None:
    layers, plain = layers_of(family), layers_of(family)
    fuse_norms(layers)
    replaced = {name: m for name, m in layers.named_modules() if isinstance(m, FusedNorm)}
    # olmo2 multiplies by its weight before it rounds: in 16 bits that is another result
    assert bool(replaced) == (family != "olmo2")
    left = [m for m in layers.modules() if type(m).__name__.endswith("RMSNorm")]
    assert bool(left) != bool(replaced)
    for name, norm in replaced.items():
        original = plain.get_submodule(name)
        original.weight.data.copy_(norm.weight.data)
        x = torch.randn(5, len(norm.weight)).bfloat16()
        assert torch.equal(norm(x), original(x))


def test_only_gated_mlps_of_frozen_linears_are_replaced() -> None:
    layers = layers_of("llama")
    fuse_mlps(layers)  # its linears are the library's
    assert not [m for m in layers.modules() if isinstance(m, FusedMlp)]
    for layer in layers:
        layer.mlp = PlainMlp(SHAPES[0], torch.float32, "silu", bias=False)
    fuse_mlps(layers)
    assert all(isinstance(layer.mlp, FusedMlp) for layer in layers)


class StandIn:
    """liger-kernel's functions in plain torch, which count how often they are called; error: of the norm."""

    def __init__(self, error: float = 0.0) -> None:
        self.calls: list[str] = []
        self.error = error
        self.liger = Liger(
            SimpleNamespace(rms_norm_forward=self.norm, rms_norm_backward=self.norm_backward),  # type: ignore
            SimpleNamespace(swiglu_forward=self.silu, swiglu_backward=self.silu_backward),  # type: ignore
        )

    def norm(self, x: Tensor, weight: Tensor, eps: float, offset: float, rounding: str, _: None) -> Any:
        self.calls.append(f"norm {rounding}")
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        y = (wide * scale * (weight.float() + offset) * (1 + self.error)).to(x.dtype)
        return y, x, scale.view(-1), 64, 4, rounding

    def norm_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        offset: float,
        *launch: Any,
        needs_dw: bool,
    ) -> tuple[Tensor, None]:
        rounding = "gemma" if offset else "llama"
        assert (
            launch == (rounding, 64, 4, False, None) and not needs_dw and x.shape == (len(scale), len(weight))
        )
        self.calls.append("norm_backward")
        g, n = gradient.float() * (weight.float() + offset), (x.float() * scale[:, None]).view(gradient.shape)
        inner = (g * n).mean(-1, keepdim=True)
        return (scale.view(*gradient.shape[:-1], 1) * (g - n * inner)).to(x.dtype), None

    def silu(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("silu")
        return gate, up, F.silu(gate) * up

    def silu_backward(self, gate: Tensor, up: Tensor, gradient: Tensor) -> None:
        self.calls.append("silu_backward")
        s = torch.sigmoid(gate)
        d_gate, d_up = gradient * up * s * (1 + gate * (1 - s)), gradient * gate * s
        gate.data.copy_(d_gate)  # behind autograd's back, as a kernel does
        up.data.copy_(d_up)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [NAMES, (), ("down_proj",)], ids=str)
def test_an_mlp_with_liger(targets: tuple[str, ...], dropout: float) -> None:
    stand_in = StandIn()
    case = Case(targets=targets, dropout=dropout)
    case.fused = FusedMlp(case.plain, stand_in.liger)
    case.check()
    assert stand_in.calls == ["silu", "silu", "silu_backward"]


def test_liger_is_for_silu_and_rows_of_one_block() -> None:
    stand_in = StandIn()
    case = Case(activation="gelu_pytorch_tanh")
    case.fused = FusedMlp(case.plain, stand_in.liger)
    case.check()
    assert not stand_in.calls
    case.plain.act_fn = nn.SiLU()
    assert FusedMlp(case.plain, stand_in.liger).liger is stand_in.liger
    case.plain.gate_proj.out_features = MAX_LIGER_COLUMNS + 1
    assert FusedMlp(case.plain, stand_in.liger).liger is None


def test_a_second_backward_with_liger_is_an_error() -> None:
    case = Case()
    y = FusedMlp(case.plain, StandIn().liger)(case.x.requires_grad_())
    y.backward(case.direction, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.direction)


@pytest.mark.parametrize(("family", "rounding"), [("llama", "llama"), ("qwen3", "llama"), ("gemma", "gemma")])
def test_norms_with_liger(family: str, rounding: str) -> None:
    stand_in, layers, plain = StandIn(), layers_of(family), layers_of(family)
    fuse_norms(layers, stand_in.liger)
    fuse_norms(plain)
    replaced = {name: m for name, m in layers.named_modules() if isinstance(m, FusedNorm)}
    assert replaced and all(norm.liger is stand_in.liger for norm in replaced.values())
    for name, norm in replaced.items():
        results = []
        for module in (plain.get_submodule(name), norm):
            x = torch.linspace(-2, 3, 6 * len(norm.weight)).bfloat16().view(2, 3, -1).requires_grad_()
            y = module(x)
            y.backward(x.detach().sin())
            results.append((y.detach(), x.grad))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert set(stand_in.calls) == {f"norm {rounding}", "norm_backward"}


@pytest.mark.parametrize("error", [0.05, float("nan")])
def test_norms_that_liger_computes_otherwise_stay_plain(error: float) -> None:
    layers = layers_of("llama")
    with pytest.warns(UserWarning, match="RMSNorm differs from LlamaRMSNorm by .* plain torch"):
        fuse_norms(layers, StandIn(error).liger)
    norms = [m for m in layers.modules() if isinstance(m, FusedNorm)]
    assert norms and all(norm.liger is None for norm in norms)
