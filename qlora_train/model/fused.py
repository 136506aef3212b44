"""Fused MLP and RMSNorm: parts of a decoder layer as single operations, in place of the library's modules.

    FusedMlp     down(act(gate(x)) * up(x))   saves x, gate, up     the library also saves the activation and
                                                                    the product: 4 I per token, not 2 I
    FusedNorm    kernels/rms_norm.py          saves x               the library saves x in fp32

Backward recomputes the product p = act(gate) * up (two elementwise passes), which the LoRA parameters of down
need. gate and up share one input (shared_input.py). With g = dL/dy, p' = dL/dp = g W_down + ...:

    d_up = p' act(gate)        d_gate = act'(gate) (p' up)        dx = d_gate W_gate + d_up W_up + ...

On a GPU with liger-kernel (kernels/liger.py) its kernels do the elementwise passes: for norms whose results
they reproduce up to rounding, and for MLPs with SiLU. d_gate and d_up then overwrite gate and up, so that
backward holds 4 I elements per token at a time instead of 6 I.

The start-up probe (probe.py) decides for which families these are used: it puts them into its tiny model and
compares outputs and gradients with the plain layer. `training.kernels: reference` uses none of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from qlora_train.device.description import MAX_LIGER_COLUMNS
from qlora_train.kernels.dropout import DropoutKeys
from qlora_train.kernels.liger import Liger
from qlora_train.kernels.rms_norm import rms_norm
from qlora_train.model.linear import FrozenLinear, linear_backward, linear_forward
from qlora_train.model.shared_input import backward_of_all, dropped_tokens, forward_of_all

NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest accepted difference of liger's results, relative to the largest value."""


class FusedNorm(nn.Module):
    """An RMSNorm with a frozen weight, that of `plain`, the library's module. offset, liger: see
    kernels/rms_norm.py."""

    def __init__(self, plain: nn.Module, offset: float, liger: Liger | None = None) -> None:
        super().__init__()
        self.weight: nn.Parameter = plain.weight  # type: ignore[assignment]
        self.eps, self.offset, self.liger = _eps_of(plain), offset, liger

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps, self.offset, self.liger)


class FusedMlp(nn.Module):
    """A gated MLP with the linears and the activation of `plain`, the library's module.

    liger: its kernels are used if the activation is SiLU; None: plain torch."""

    def __init__(self, plain: nn.Module, liger: Liger | None = None) -> None:
        super().__init__()
        self.gate_proj: FrozenLinear = plain.gate_proj  # type: ignore[assignment]
        self.up_proj: FrozenLinear = plain.up_proj  # type: ignore[assignment]
        self.down_proj: FrozenLinear = plain.down_proj  # type: ignore[assignment]
        self.act_fn: nn.Module = plain.act_fn  # type: ignore[assignment]
        is_silu = type(self.act_fn) in (nn.SiLU, SiLUActivation)
        self.liger = liger if is_silu and self.gate_proj.out_features <= MAX_LIGER_COLUMNS else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, D] -> [..., T, D]."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        lora = [linear.lora.A for linear in linears if linear.lora is not None]
        return _FusedMlpFunction.apply(x, self, *lora)

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up, both [T, I] -> [T, I]."""
        return self.act_fn(gate).mul_(up) if self.liger is None else self.liger.silu_mul(gate, up)

    def before_down(
        self, gradient: Tensor, gate: Tensor, up: Tensor, down_tokens: DropoutKeys | None
    ) -> tuple[Tensor, Tensor]:
        """From gradient = dL/dy [T, D] to (d_gate, d_up) [T, I] each, adding the gradients of down's LoRA
        parameters. gate and up may be overwritten."""
        if self.liger is not None:
            d_product = self._through_down(gradient, self.product(gate, up), down_tokens)
            self.liger.silu_mul_backward_(gate, up, d_product)
            return gate, up
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = self.act_fn(leaf)
        d_product = self._through_down(gradient, activated.detach() * up, down_tokens)
        d_up = d_product * activated.detach()
        (d_gate,) = torch.autograd.grad(activated, leaf, d_product.mul_(up))
        return d_gate, d_up

    def _through_down(self, gradient: Tensor, product: Tensor, tokens: DropoutKeys | None) -> Tensor:
        d_product = linear_backward(self.down_proj, gradient, product, None, tokens)
        assert d_product is not None
        return d_product


class _FusedMlpFunction(torch.autograd.Function):
    """Autograd of `FusedMlp`; the A matrices are passed so that the output requires a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: FusedMlp, *lora: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        (gate, up), hs = forward_of_all((mlp.gate_proj, mlp.up_proj), flat)
        ctx.mlp = mlp
        ctx.tokens = dropped_tokens((mlp.gate_proj, mlp.up_proj)), dropped_tokens((mlp.down_proj,))
        ctx.save_for_backward(x, gate, up, *hs)
        if mlp.down_proj.skip_output:
            return x.new_zeros(()).expand(x.shape)
        y, _ = linear_forward(mlp.down_proj, mlp.product(gate, up))
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mlp: FusedMlp = ctx.mlp
        tokens, down_tokens = ctx.tokens
        x, gate, up, *hs = ctx.saved_tensors
        flat, g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        # gate and up were made in forward and are used nowhere else, so they may be overwritten; a second
        # backward through this graph would be an error of autograd's
        d_gate, d_up = mlp.before_down(g, gate, up, down_tokens)
        gate_and_up, needs_dx = (mlp.gate_proj, mlp.up_proj), ctx.needs_input_grad[0]
        grad_input = backward_of_all(gate_and_up, (d_gate, d_up), flat, hs, tokens, needs_dx=needs_dx)
        return (
            (None if grad_input is None else grad_input.view(x.shape)),
            None,
            *([None] * (len(ctx.needs_input_grad) - 2)),
        )


def fuse_mlps(layers: Iterable[nn.Module], liger: Liger | None = None) -> None:
    """Replace every gated MLP of three linears by a `FusedMlp`."""
    for layer in layers:
        mlp = getattr(layer, "mlp", None)
        parts = [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
        if all(isinstance(part, FrozenLinear) for part in parts) and hasattr(mlp, "act_fn"):
            layer.mlp = FusedMlp(mlp, liger)  # type: ignore[arg-type]  # not None: it has parts


def fuse_norms(layers: Iterable[nn.Module], liger: Liger | None = None) -> None:
    """Replace every RMSNorm in the layers that our plain torch formula reproduces bit for bit by a
    `FusedNorm`, with liger's kernels if given and within `NEAR`."""
    for layer in layers:
        for owner in list(layer.modules()):
            for name, norm in list(_rms_norms(owner)):
                offset = _offset_of(norm)
                if offset is not None:
                    is_near = liger is not None and _is_near(norm, offset, liger)
                    setattr(owner, name, FusedNorm(norm, offset, liger if is_near else None))


def _rms_norms(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in owner.named_children():
        weight = getattr(child, "weight", None)
        if type(child).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1:
            yield name, child


def _eps_of(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)  # type: ignore[arg-type]


@torch.no_grad()
def _offset_of(norm: nn.Module) -> float | None:
    """The offset with which `FusedNorm` in plain torch reproduces this module's bits on a CPU; None: no
    offset does."""
    norm = _twin(norm, torch.device("cpu"))
    x, expected = _tried_out(norm)
    matching = (o for o in (0.0, 1.0) if torch.equal(FusedNorm(norm, o)(x), expected))
    return next(matching, None)


@torch.no_grad()
def _is_near(norm: nn.Module, offset: float, liger: Liger) -> bool:
    """Whether liger's kernels reproduce the results of this module within `NEAR`; warns if not."""
    if norm.weight.is_meta:  # a plan assumes it
        return True
    norm = _twin(norm, norm.weight.device)  # type: ignore[arg-type]
    x, expected = _tried_out(norm)
    difference = (FusedNorm(norm, offset, liger)(x) - expected).abs().max() / expected.abs().max()
    is_near = bool(difference <= NEAR[x.dtype])  # False for NaN
    if not is_near:
        warnings.warn(
            f"liger-kernel's RMSNorm differs from {type(norm).__name__} by {difference:.1e} of the largest "
            f"value, in {x.dtype}: plain torch takes its place.",
            stacklevel=3,
        )
    return is_near


def _twin(norm: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the module on `device` with a weight of distinct numbers: with a weight of ones, all families
    would round alike."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    twin = copy(norm)
    numbers = torch.linspace(0.5, 1.5, len(weight), device=device).to(weight.dtype)
    twin._parameters = {**norm._parameters, "weight": nn.Parameter(numbers, requires_grad=False)}
    return twin


def _tried_out(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A test input [2, D] and the module's output [2, D] for it."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    x = torch.linspace(-3, 3, 2 * len(weight), device=weight.device).to(weight.dtype).view(2, -1)
    return x, norm(x)
