"""Linears that read one input, as one operation: an attention's q, k and v; an MLP's gate and up.

    y_i = x W_i^T + s h_i B_i^T          [h_1 .. h_n] = x [A_1; ..; A_n]^T

Their A lie one after another in the flat buffer (factors.py), so the stacked A [n R, in] is a view: one
product instead of n on the way there, two instead of 2 n on the way back. With g_i = dL/dy_i:

    dh_i = s g_i B_i      dA = dh^T x      dx = sum_i g_i W_i + dh A

dx is one buffer that all products are added to; autograd would allocate n and add them up. Saved for
backward: x and h, once, T (in + n R) elements. Each weight is dequantized once on each way, when its turn
comes: never more than one is there.

With dropout each module has a mask of its own, so each has another x in its branch, and where only some of
the linears have factors, or they lie in another order, there is nothing to stack: then factors are taken one
by one, and dx stays one buffer.
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
    grad_input_of_weight,
    grad_of_low_rank,
    linear_backward,
    linear_forward,
)

QKV = ("q_proj", "k_proj", "v_proj")


def forward_of_all(linears: Sequence[FrozenLinear], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """x [T, in] -> (every y [T, out], what `backward_of_all` wants: h [T, n R], or those of the linears with
    factors one by one). For use inside a Function: nothing is recorded."""
    lora = _stackable(linears)
    if lora is None:
        results = [linear_forward(linear, x) for linear in linears]
        return [y for y, _ in results], [h for _, h in results if h is not None]
    stacked = F.linear(x, _stacked([f.A.detach() for f in lora]))
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
    """From every dL/dy [T, out] to dL/dx [T, in], None where it is not needed; factor gradients are added
    where they belong. hs: what `forward_of_all` returned. tokens: those of the forward pass, if anything was
    dropped."""
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
        if needs_dx:
            grad_input = grad_input_of_weight(linear, gradient, grad_input)
        low.append(grad_of_low_rank(module, gradient, h))
    dh = torch.cat([d for d, _ in low], dim=1)
    for module, gradient_a, (_, gradient_b) in zip(lora, (dh.t() @ x).split(rank), low, strict=True):
        module.add_gradients(gradient_a, gradient_b)
    return (
        None
        if grad_input is None
        else grad_input.addmm_(dh, _stacked([module.A.detach() for module in lora]))
    )


def dropped_tokens(linears: Iterable[FrozenLinear]) -> DropoutKeys | None:
    """Keys for the dropout of these linears, None where nothing is dropped."""
    keys = (linear.lora.tokens_to_drop() for linear in linears if linear.lora is not None)
    return next(keys, None)


def _stackable(linears: Sequence[FrozenLinear]) -> list[LinearLora] | None:
    """The factors of all linears, or None: some have none, something is dropped, or they do not lie side by
    side, with one rank."""
    lora = [linear.lora for linear in linears if linear.lora is not None]
    if len(lora) < len(linears) or dropped_tokens(linears) is not None:
        return None
    first = lora[0].A
    places = [first.storage_offset() + i * first.numel() for i in range(len(lora))]
    alike = all(module.A.shape == first.shape for module in lora)
    return lora if alike and [module.A.storage_offset() for module in lora] == places else None


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Parts [R, in] that lie one after another in one buffer, as [n R, in]."""
    first = parts[0]
    return first.as_strided((len(parts) * len(first), first.shape[1]), first.stride())


class SharedInputs:
    """The linears of one input where a module calls them one by one: the first call computes all, the others
    take what is theirs."""

    def __init__(self, linears: Sequence[FrozenLinear]) -> None:
        self.linears = tuple(linears)
        self._x: Tensor | None = None
        self._ys: list[Tensor | None] = []

    def take(self, index: int, x: Tensor) -> Tensor:
        """The output [..., out] of linear `index` for x [..., in]. Each is handed out once: another call, or
        another x, computes all again."""
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
        """Let go of outputs that nobody took: something went wrong between two calls."""
        self._x, self._ys = None, []


class SharedLinear(nn.Module):
    """Stands where a linear stood that shares its input with others."""

    def __init__(self, linear: FrozenLinear, together: SharedInputs, index: int) -> None:
        super().__init__()
        self.linear, self.together, self._index = linear, together, index

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.together.take(self._index, x)


def fuse_qkv(layers: Iterable[nn.Module]) -> None:
    """Let q, k and v of every attention that has the three be one operation."""
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        linears = [getattr(attention, name, None) for name in QKV]
        if attention is not None and all(isinstance(linear, FrozenLinear) for linear in linears):
            together = SharedInputs(linears)  # type: ignore[arg-type]  # all are
            for index, name in enumerate(QKV):
                setattr(attention, name, SharedLinear(together.linears[index], together, index))


class _SharedInputFunction(torch.autograd.Function):
    """The factors' A are passed so that autograd sees that something needs a gradient."""

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
        x, *hs = ctx.saved_tensors or rows  # without factors, x is not asked for
        needs_dx = ctx.needs_input_grad[0]
        grad_input = backward_of_all(
            ctx.linears, rows, x.reshape(-1, x.shape[-1]), hs, ctx.tokens, needs_dx=needs_dx
        )
        rest = [None] * (len(ctx.needs_input_grad) - 1)
        return (None if grad_input is None else grad_input.view(*gradients[0].shape[:-1], -1)), *rest
