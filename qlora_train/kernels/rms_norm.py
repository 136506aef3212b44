"""RMSNorm with a frozen weight (Zhang and Sennrich 2019, arXiv:1910.07467).

    y = (w + o) x r    r = 1 / sqrt(mean(x^2) + eps)    x [..., D], w [D], o = 0, or 1 in gemma's convention

The sums are in fp32 for every dtype of x, as in the library's modules. With g = dL/dy and g' = (w + o) g:

    dx = r (g' - n mean(g' n))      n = x r

Saved for backward: x and r, one number per token. The library computes the norm in six operations, for which
autograd saves x in fp32 and differentiates the square as a power: 4 bytes more per element, and on a CPU
almost twice the time (5.1 against 2.75 ms, forward and backward, [1, 1024, 1024] in bfloat16). The weight is
frozen, so it has no gradient.

The rounding of the product with w differs between families: most round n to x's dtype first, gemma multiplies
in fp32. Both are reproduced, so the output has the library's bits. On a GPU liger-kernel (liger.py), if
installed, does the same in one pass over x, up to rounding, and saves the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_train.kernels.liger import Liger


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, liger: Liger | None = None) -> Tensor:
    """RMSNorm of x [..., D] with weight [D] -> [..., D] in x's dtype. offset: o, which also selects the
    rounding (0: n first; 1: gemma's). liger: its kernels are used; None: plain torch."""
    if liger is None:
        return _RmsNorm.apply(x, weight, eps, offset)
    return _LigerRmsNorm.apply(x, weight, eps, offset, liger)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        normed = wide * scale
        del wide
        ctx.save_for_backward(x, scale, weight)
        ctx.offset = offset
        if offset:
            return normed.mul_(weight.float() + offset).to(x.dtype)
        return normed.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale, weight = ctx.saved_tensors
        plus = ctx.offset
        grad_input = gradient.float() * (weight.float() + plus) if plus else (gradient * weight).float()
        normed = x.float() * scale
        inner = (grad_input * normed).mean(-1, keepdim=True)
        grad_input = grad_input.sub_(normed.mul_(inner)).mul_(scale)
        return grad_input.to(x.dtype), None, None, None


class _LigerRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, liger: Liger) -> Tensor:
        y, scale, ctx.launch = liger.rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, scale, weight)
        ctx.offset, ctx.liger = offset, liger
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, scale, weight = ctx.saved_tensors
        grad_input = ctx.liger.rms_norm_backward(gradient, x, weight, scale, ctx.offset, ctx.launch)
        return grad_input, None, None, None, None
