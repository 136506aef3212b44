"""Linears that share one input as one operation: an attention's q, k and v; an MLP's gate and up.

    y_i = x W_i^T + s h_i B_i^T          [h_1 .. h_n] = x [A_1; ..; A_n]^T

Their A matrices are adjacent in the flat buffer (lora_parameters.py), so the stacked A [n R, in] is a view:
one product instead of n in forward, two instead of 2 n in backward. With g_i = dL/dy_i:

    dh_i = s g_i B_i      dA = dh^T x      dx = sum_i g_i W_i + dh A

dx is one buffer that all products are added to; autograd would allocate n buffers and add them. Saved for
backward: x and h, once, T (in + n R) elements. Each weight is dequantized once in forward and once in
backward, right before its product: at most one dequantized weight exists at a time.

Without stacking, the linears' LoRA branches are computed one by one, still with one dx buffer: with dropout,
where every module has its own mask; if only some of the linears have LoRA parameters; if their A matrices are
not adjacent and in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_train.kernels.dropout import DropoutKeys
from qlora_train.model.linear import (
    FrozenLinear,
    LinearLora,
    as_own,
    backward_of_weight,
    grad_of_low_rank,
    linear_backward,
    linear_forward,
)

QKV = ("q_proj", "k_proj", "v_proj")


def forward_of_all(linears: Sequence[FrozenLinear], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Forward inside an autograd.Function: x [T, in] -> (every y [T, out], hs for `backward_of_all`).

    hs: one stacked h [T, n R], or one h [T, R] for each linear with LoRA parameters."""
    lora = _stackable(linears)
    if lora is None:
        results = [linear_forward(linear, x) for linear in linears]
        return [y for y, _ in results], [h for _, h in results if h is not None]
    stacked = F.linear(x, _stacked([module.A.detach() for module in lora]))
    parts = stacked.split(len(lora[0].A), dim=1)
    ys = [linear_forward(linear, x, h)[0] for linear, h in zip(linears, parts, strict=True)]
    return ys, [stacked]


def backward_of_all(
    linears: Sequence[FrozenLinear],
    gradients: Sequence[Tensor],
    x: Tensor,
    hs: Sequence[Tensor],
    tokens: DropoutKeys | None,
    *,
    needs_dx: bool,
) -> Tensor | None:
    """From every dL/dy [T, out] to dL/dx [T, in], adding dA and dB to the flat gradient.

    Returns None unless `needs_dx`. hs: from `forward_of_all`. tokens: the dropout keys of the forward pass;
    None: nothing was dropped."""
    grad_input: Tensor | None = None
    lora = _stackable(linears) if tokens is None else None
    if lora is None:
        waiting = list(hs)
        for linear, gradient in zip(linears, gradients, strict=True):
            h = waiting.pop(0) if linear.lora is not None else None
            grad_input = linear_backward(linear, gradient, x, h, tokens, needs_dx=needs_dx, add_to=grad_input)
        return grad_input
    rank = len(lora[0].A)
    low = []
    for linear, module, gradient, h in zip(linears, lora, gradients, hs[0].split(rank, 1), strict=True):
        grad_input, reaching = backward_of_weight(linear, gradient, x, h, grad_input, needs_dx=needs_dx)
        low.append(grad_of_low_rank(module, reaching, h))
        del reaching
    dh = torch.cat([d for d, _ in low], dim=1)
    for module, gradient_a, (_, gradient_b) in zip(lora, (dh.t() @ x).split(rank), low, strict=True):
        module.add_gradients(gradient_a, gradient_b)
    return (
        None
        if grad_input is None
        else grad_input.addmm_(dh, _stacked([module.A.detach() for module in lora]))
    )


def dropped_tokens(linears: Iterable[FrozenLinear]) -> DropoutKeys | None:
    """The dropout keys of these linears; None: nothing is dropped."""
    keys = (linear.lora.tokens_to_drop() for linear in linears if linear.lora is not None)
    return next(keys, None)


def _stackable(linears: Sequence[FrozenLinear]) -> list[LinearLora] | None:
    """The LoRA modules of all linears if their A can be stacked: all exist, have one shape and are adjacent
    in the flat buffer, and nothing is dropped. Else None."""
    lora = [linear.lora for linear in linears if linear.lora is not None]
    if len(lora) < len(linears) or dropped_tokens(linears) is not None:
        return None
    first = lora[0].A
    places = [first.storage_offset() + i * first.numel() for i in range(len(lora))]
    alike = all(module.A.shape == first.shape for module in lora)
    return lora if alike and [module.A.storage_offset() for module in lora] == places else None


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """One view [n R, in] of n parts [R, in] that are adjacent in one buffer."""
    first = parts[0]
    return first.as_strided((len(parts) * len(first), first.shape[1]), first.stride())


class SharedInputs:
    """Linears of one input that a module calls one by one: the first call computes all outputs, the others
    return theirs."""

    def __init__(self, linears: Sequence[FrozenLinear]) -> None:
        self.linears = tuple(linears)
        self._x: Tensor | None = None
        self._ys: list[Tensor | None] = []

    def take(self, index: int, x: Tensor) -> Tensor:
        """The output [..., out] of linear `index` for x [..., in]. Each output is returned once: a repeated
        call, or another x, computes all again."""
        if x is not self._x or self._ys[index] is None:
            self.forget()
            lora = [linear.lora.A for linear in self.linears if linear.lora is not None]
            self._x, self._ys = x, list(_SharedInputFunction.apply(x, self.linears, *lora))
        y, self._ys[index] = self._ys[index], None
        if all(rest is None for rest in self._ys):
            self.forget()
        assert y is not None
        return y

    def forget(self) -> None:
        """Release outputs that were not taken, after the last one or after an exception between calls."""
        self._x, self._ys = None, []


class SharedLinear(nn.Module):
    """Replaces a linear that shares its input with others; `together` computes it."""

    def __init__(self, linear: FrozenLinear, together: SharedInputs, index: int) -> None:
        super().__init__()
        self.linear, self.together, self._index = linear, together, index

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.together.take(self._index, x)


def fuse_qkv(layers: Iterable[nn.Module]) -> None:
    """Replace q_proj, k_proj and v_proj of every attention module that has the three by one operation."""
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        linears = [getattr(attention, name, None) for name in QKV]
        if attention is not None and all(isinstance(linear, FrozenLinear) for linear in linears):
            together = SharedInputs(linears)  # type: ignore[arg-type]  # all are
            for index, name in enumerate(QKV):
                setattr(attention, name, SharedLinear(together.linears[index], together, index))


class _SharedInputFunction(torch.autograd.Function):
    """Autograd of `SharedInputs`; the A matrices are passed so that the outputs require a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: tuple[FrozenLinear, ...], *lora: Tensor) -> tuple[Tensor, ...]:
        ys, hs = forward_of_all(linears, x.reshape(-1, x.shape[-1]))
        ctx.linears, ctx.tokens = linears, dropped_tokens(linears)
        if hs:
            ctx.save_for_backward(x, *hs)
        return tuple(as_own(y, x) for y in ys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows = [g.reshape(-1, g.shape[-1]) for g in gradients]
        x, *hs = ctx.saved_tensors or rows  # without LoRA parameters, x is not used
        needs_dx = ctx.needs_input_grad[0]
        grad_input = backward_of_all(
            ctx.linears, rows, x.reshape(-1, x.shape[-1]), hs, ctx.tokens, needs_dx=needs_dx
        )
        rest = [None] * (len(ctx.needs_input_grad) - 1)
        return (None if grad_input is None else grad_input.view(*gradients[0].shape[:-1], -1)), *rest
