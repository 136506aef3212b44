"""Parts of a decoder layer as single operations, in place of the library's modules.

    FusedMlp     down(act(gate(x)) * up(x))   saves x, gate, up     the library's saves the activation and the
                                                                    product too: 4 I per token instead of 2 I
    FusedNorm    kernels/rms_norm.py          saves x               the library's saves x in fp32

In backward the product p = act(gate) * up is computed again (two elementwise passes), and with it whatever
down's factors need. The input gradients of gate and up are added up by the second product itself. With
g = dL/dy, p' = g W_down + ...:

    d_up = p' act(gate)        d_gate = act'(gate) (p' up)        dx = d_gate W_gate + d_up W_up + ...

Which families these fit is not looked up but tried: the start-up probe (probe.py) swaps them into its tiny
model and compares outputs and gradients with the plain layer. `training.kernels: reference` swaps nothing.

Attention's q, k and v are not fused: they share one saved input as it is, and their LoRA-A as one product
gained nothing measurable (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.rms_norm import rms_norm
from qlora_train.model.linear import FrozenLinear, linear_backward, linear_forward


class FusedNorm(nn.Module):
    """An RMSNorm whose weight is frozen; takes over the weight of `plain`, the library's module. offset: see
    kernels/rms_norm.py."""

    def __init__(self, plain: nn.Module, offset: float) -> None:
        super().__init__()
        self.weight: nn.Parameter = plain.weight  # type: ignore[assignment]
        self.eps, self.offset = _eps_of(plain), offset

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps, self.offset)


class FusedMlp(nn.Module):
    """A gated MLP; takes over the linears and the activation of `plain`, the library's module."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.gate_proj: FrozenLinear = plain.gate_proj  # type: ignore[assignment]
        self.up_proj: FrozenLinear = plain.up_proj  # type: ignore[assignment]
        self.down_proj: FrozenLinear = plain.down_proj  # type: ignore[assignment]
        self.act_fn: nn.Module = plain.act_fn  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, D] -> [..., T, D]."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        factors = [linear.factors.A for linear in linears if linear.factors is not None]
        return _FusedMlpFunction.apply(x, self, *factors)


class _FusedMlpFunction(torch.autograd.Function):
    """The factors' A are passed so that autograd sees that something needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: FusedMlp, *factors: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gate, gate_h = linear_forward(mlp.gate_proj, flat)
        up, up_h = linear_forward(mlp.up_proj, flat)
        ctx.mlp, ctx.tokens = mlp, [_tokens(linear) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        ctx.save_for_backward(x, gate, gate_h, up, up_h)
        if mlp.down_proj.skips_value:
            return x.new_zeros(()).expand(x.shape)
        y, _ = linear_forward(mlp.down_proj, mlp.act_fn(gate).mul_(up))
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mlp: FusedMlp = ctx.mlp
        gate_tokens, up_tokens, down_tokens = ctx.tokens
        x, gate, gate_h, up, up_h = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = mlp.act_fn(leaf)
        product = activated.detach() * up
        g = gradient.reshape(-1, gradient.shape[-1])
        d_product = linear_backward(mlp.down_proj, g, product, None, down_tokens)
        assert d_product is not None
        del product
        d_up = d_product * activated.detach()
        (d_gate,) = torch.autograd.grad(activated, leaf, d_product.mul_(up))
        del activated, leaf, d_product
        needs_dx = ctx.needs_input_grad[0]
        dx = linear_backward(mlp.gate_proj, d_gate, flat, gate_h, gate_tokens, needs_dx=needs_dx)
        dx = linear_backward(mlp.up_proj, d_up, flat, up_h, up_tokens, needs_dx=needs_dx, onto=dx)
        return (None if dx is None else dx.view(x.shape)), None, *([None] * (len(ctx.needs_input_grad) - 2))


def _tokens(linear: FrozenLinear) -> Any:
    return linear.factors.tokens_to_drop() if linear.factors is not None else None


def fuse_mlps(layers: Iterable[nn.Module]) -> None:
    """Put a `FusedMlp` where a layer has a gated MLP of three linears."""
    for layer in layers:
        mlp = getattr(layer, "mlp", None)
        parts = [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
        if all(isinstance(part, FrozenLinear) for part in parts) and hasattr(mlp, "act_fn"):
            layer.mlp = FusedMlp(mlp)  # type: ignore[arg-type]  # not None: it has parts


def fuse_norms(layers: Iterable[nn.Module]) -> None:
    """Put a `FusedNorm` in place of every RMSNorm in a layer that ours computes bit for bit."""
    for layer in layers:
        for owner in list(layer.modules()):
            for name, norm in list(_rms_norms(owner)):
                offset = _offset_of(norm)
                if offset is not None:
                    setattr(owner, name, FusedNorm(norm, offset))


def _rms_norms(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in owner.named_children():
        weight = getattr(child, "weight", None)
        if type(child).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1:
            yield name, child


def _eps_of(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)  # type: ignore[arg-type]


@torch.no_grad()
def _offset_of(norm: nn.Module) -> float | None:
    """The offset with which ours gives the bits of this module, None if none does."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    x = torch.linspace(-3, 3, 2 * len(weight), device=weight.device).to(weight.dtype).view(2, -1)
    expected = norm(x)
    matching = (o for o in (0.0, 1.0) if torch.equal(rms_norm(x, weight, _eps_of(norm), o), expected))
    return next(matching, None)
