"""Parts of a decoder layer as single operations, in place of the library's modules.

    FusedMlp     down(act(gate(x)) * up(x))   saves x, gate, up     the library's saves the activation and the
                                                                    product too: 4 I per token instead of 2 I
    FusedNorm    kernels/rms_norm.py          saves x               the library's saves x in fp32

In backward the product p = act(gate) * up is computed again (two elementwise passes), and with it whatever
down's factors need. gate and up read one input (shared_input.py). With g = dL/dy, p' = g W_down + ...:

    d_up = p' act(gate)        d_gate = act'(gate) (p' up)        dx = d_gate W_gate + d_up W_up + ...

On a GPU liger-kernel's kernels (kernels/liger.py), if they are there, do the elementwise passes: of a norm
whose results they give up to rounding, and of an MLP whose activation is SiLU. d_gate and d_up then take the
places of gate and up, so that backward has 4 I per token alive at a time instead of 6 I.

Which families these fit is not looked up but tried: the start-up probe (probe.py) swaps them into its tiny
model and compares outputs and gradients with the plain layer. `training.kernels: reference` swaps nothing.
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
"""What liger's results may differ by, relative to the largest value."""


class FusedNorm(nn.Module):
    """An RMSNorm whose weight is frozen; takes over the weight of `plain`, the library's module. offset,
    liger: see kernels/rms_norm.py."""

    def __init__(self, plain: nn.Module, offset: float, liger: Liger | None = None) -> None:
        super().__init__()
        self.weight: nn.Parameter = plain.weight  # type: ignore[assignment]
        self.eps, self.offset, self.liger = _eps_of(plain), offset, liger

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps, self.offset, self.liger)


class FusedMlp(nn.Module):
    """A gated MLP; takes over the linears and the activation of `plain`, the library's module.
    liger: whose kernels to use where they do what the activation does; None: plain torch."""

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
        """act(gate) * up, all [T, I]."""
        return self.act_fn(gate).mul_(up) if self.liger is None else self.liger.silu_mul(gate, up)

    def before_down(
        self, gradient: Tensor, gate: Tensor, up: Tensor, down_tokens: DropoutKeys | None
    ) -> tuple[Tensor, Tensor]:
        """From gradient = dL/dy [T, D] to (d_gate, d_up), through down, whose factors get theirs. gate, up:
        overwritten."""
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
    """The factors' A are passed so that autograd sees that something needs a gradient."""

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
        # gate and up are ours alone: made in forward, and nobody else has seen them. They may be overwritten
        # because backward runs once; a second time autograd would miss their values, and say so
        d_gate, d_up = mlp.before_down(g, gate, up, down_tokens)
        both, needs_dx = (mlp.gate_proj, mlp.up_proj), ctx.needs_input_grad[0]
        grad_input = backward_of_all(both, (d_gate, d_up), flat, hs, tokens, needs_dx=needs_dx)
        return (
            (None if grad_input is None else grad_input.view(x.shape)),
            None,
            *([None] * (len(ctx.needs_input_grad) - 2)),
        )


def fuse_mlps(layers: Iterable[nn.Module], liger: Liger | None = None) -> None:
    """Put a `FusedMlp` where a layer has a gated MLP of three linears."""
    for layer in layers:
        mlp = getattr(layer, "mlp", None)
        parts = [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
        if all(isinstance(part, FrozenLinear) for part in parts) and hasattr(mlp, "act_fn"):
            layer.mlp = FusedMlp(mlp, liger)  # type: ignore[arg-type]  # not None: it has parts


def fuse_norms(layers: Iterable[nn.Module], liger: Liger | None = None) -> None:
    """Put a `FusedNorm` in place of every RMSNorm in a layer that plain torch computes bit for bit as the
    library does, with liger's kernels where they are given and near enough."""
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
    """The offset with which ours, in plain torch, gives the bits of this module on a CPU, None if none
    does."""
    norm = _twin(norm, torch.device("cpu"))
    x, expected = _tried_out(norm)
    matching = (o for o in (0.0, 1.0) if torch.equal(FusedNorm(norm, o)(x), expected))
    return next(matching, None)


@torch.no_grad()
def _is_near(norm: nn.Module, offset: float, liger: Liger) -> bool:
    """Whether liger's kernels give the results of this module; warns if not."""
    if norm.weight.is_meta:  # a plan: they are taken to
        return True
    norm = _twin(norm, norm.weight.device)  # type: ignore[arg-type]
    x, expected = _tried_out(norm)
    difference = (FusedNorm(norm, offset, liger)(x) - expected).abs().max() / expected.abs().max()
    is_near = bool(difference <= NEAR[x.dtype])  # NaN is not
    if not is_near:
        warnings.warn(
            f"liger-kernel's RMSNorm differs from {type(norm).__name__} by {difference:.1e} of the largest "
            f"value, in {x.dtype}: plain torch takes its place.",
            stacklevel=3,
        )
    return is_near


def _twin(norm: nn.Module, device: torch.device) -> nn.Module:
    """The same module with a weight of its own on `device`. No two numbers of it are alike, so that what is
    found out holds for every weight: a norm of ones rounds alike in every family."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    twin = copy(norm)
    numbers = torch.linspace(0.5, 1.5, len(weight), device=device).to(weight.dtype)
    twin._parameters = {**norm._parameters, "weight": nn.Parameter(numbers, requires_grad=False)}
    return twin


def _tried_out(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """An input [2, D] and what the module makes of it."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    x = torch.linspace(-3, 3, 2 * len(weight), device=weight.device).to(weight.dtype).view(2, -1)
    return x, norm(x)
