"""The frozen linear with its LoRA factors: y = x W^T + b + s (x A^T) B^T, W packed and frozen.

Shapes: x [..., T, in], W [out, in], A [R, in], B [out, R], s = alpha / R (or alpha / sqrt(R), rank-stabilised
LoRA, Kalajdzievski 2023, arXiv:2312.03732). QLoRA: Dettmers et al. 2023, arXiv:2305.14314.

Two paths, chosen by `training.kernels`:

- `reference` writes the formula with library operations and lets autograd do the rest. Autograd saves the
  unpacked W (2 in*out bytes in 16 bits) until backward, and puts the factor gradients into `.grad` in the
  compute dtype.
- `auto` is one autograd.Function. Saved for backward: x and h = x A^T, i.e. T (in + R) elements; never W.
  Backward asks the weight source again, so a weight may have left the device in between. With g = dL/dy:

      dB = s g^T h        dh = s g B        dA = dh^T x        dx = g W + dh A

  dA and dB (cheap: 2 T R (in + out) FLOPs each way) are added to the flat fp32 gradient right here, and
  autograd is handed None for them: micro-batches accumulate in fp32, with no gradient tensors of their own.

Why not bitsandbytes' own MatMul4Bit: it keeps the packed tensor itself on ctx. Once weights stream through
recycled slots that tensor is overwritten before backward, and the gradient is silently wrong.

With dropout, x in the LoRA branch is dropout(x); its mask is a pure function of the token
(kernels/dropout.py) and is computed again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_train.kernels.dropout import TokenKeys, dropout, keep_mask
from qlora_train.model.weights import LayerSource


class DropoutContext:
    """The micro-batch that passes through the layers now; None while evaluating. Shared by all factors."""

    def __init__(self) -> None:
        self.tokens: TokenKeys | None = None


class LoraFactors(nn.Module):
    """One module's A and B: views of the flat working copy, with views of the flat fp32 gradient.

    A [R, in] and B [out, R] are the only trainable parameters of a model.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        gradient_a: Tensor,
        gradient_b: Tensor,
        scaling: float,
        dropout_probability: float,
        module_id: int,
        context: DropoutContext,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        self.gradient_a = gradient_a
        self.gradient_b = gradient_b
        self.scaling = scaling
        self.dropout_probability = dropout_probability
        self.module_id = module_id
        self.context = context

    def tokens_to_drop(self) -> TokenKeys | None:
        """Keys for dropout, or None where nothing is dropped (evaluation, probability 0)."""
        return self.context.tokens if self.dropout_probability > 0 else None

    def add_gradients(self, gradient_a: Tensor, gradient_b: Tensor) -> None:
        """Add one micro-batch's gradients to the flat fp32 gradient."""
        self.gradient_a.add_(gradient_a)
        self.gradient_b.add_(gradient_b)

    def collect_autograd(self) -> None:
        """Move what autograd left in `.grad` (reference path) to the flat fp32 gradient."""
        if self.A.grad is not None and self.B.grad is not None:
            self.add_gradients(self.A.grad, self.B.grad)
            self.A.grad = self.B.grad = None


class FrozenLinear(nn.Module):
    """A linear layer whose weight is asked from a `LayerSource` at each use.

    name: the module path in the model; `source.unpack(name, dtype)` gives [out_features, in_features]. source
    is set when the model comes alive. skips_value: the output is zeros, while backward stays what it is;
    right only where the output goes straight into the residual sum and only its gradient is wanted.
    """

    bias: nn.Parameter | None
    source: LayerSource

    def __init__(self, name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.name = name
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", None)
        self.factors: LoraFactors | None = None
        self.use_autograd = False
        self.skips_value = False

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if not self.use_autograd:
            factors = self.factors
            a, b = (factors.A, factors.B) if factors is not None else (None, None)
            return _FrozenLinearFunction.apply(x, a, b, self)
        y = F.linear(x, self.source.unpack(self.name, x.dtype), self.bias)
        if self.factors is None:
            return y
        branch = _dropped(x, self.factors)
        return y + F.linear(F.linear(branch, self.factors.A), self.factors.B) * self.factors.scaling

    def extra_repr(self) -> str:
        return f"{self.name}: {self.in_features} -> {self.out_features}"


def _dropped(x: Tensor, factors: LoraFactors) -> Tensor:
    tokens = factors.tokens_to_drop()
    if tokens is None:
        return x
    return dropout(x, tokens, factors.module_id, factors.dropout_probability)


def linear_forward(linear: FrozenLinear, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x [T, in] -> (y [T, out], h [T, R] for `linear_backward`, None without factors). For use inside a
    Function: nothing is recorded. Where `skips_value` is set, y is zeros. h: x A^T where it is known."""
    if linear.skips_value:
        y = x.new_zeros(()).expand(len(x), linear.out_features)
    else:
        y = F.linear(x, linear.source.unpack(linear.name, x.dtype), linear.bias)
    factors = linear.factors
    if factors is None:
        return y, None
    if h is None:
        h = F.linear(_dropped(x, factors), factors.A)
    if not linear.skips_value:
        y.addmm_(h, factors.B.t(), alpha=factors.scaling)
    return y, h


def linear_backward(
    linear: FrozenLinear,
    gradient: Tensor,
    x: Tensor,
    h: Tensor | None,
    tokens: TokenKeys | None,
    *,
    needs_dx: bool = True,
    onto: Tensor | None = None,
) -> Tensor | None:
    """From gradient = dL/dy [T, out] to dL/dx [T, in], None where it is not needed; factor gradients are
    added where they belong.

    x [T, in]: the input. h: what `linear_forward` returned, or None: computed again. tokens: those of the
    forward pass, if anything was dropped. onto: a tensor that dL/dx is added to and that is returned.
    """
    dx = through_weight(linear, gradient, onto) if needs_dx else None
    factors = linear.factors
    if factors is None:
        return dx
    a, kept = factors.A.detach(), None
    if tokens is not None:
        mask = keep_mask(tokens, factors.module_id, linear.in_features, factors.dropout_probability)
        kept = mask.to(x.dtype).mul_(1.0 / (1.0 - factors.dropout_probability))
        x = x * kept
    if h is None:
        h = F.linear(x, a)
    dh, gradient_b = through_b(factors, gradient, h)
    factors.add_gradients(dh.t() @ x, gradient_b)
    del gradient_b
    if dx is not None:
        dx = dx.addmm_(dh, a) if kept is None else dx.add_((dh @ a).mul_(kept))
    return dx


def through_weight(linear: FrozenLinear, gradient: Tensor, onto: Tensor | None) -> Tensor:
    """gradient W [T, in], added to `onto` where it is given."""
    weight = linear.source.unpack(linear.name, gradient.dtype)
    return gradient @ weight if onto is None else onto.addmm_(gradient, weight)


def through_b(factors: LoraFactors, gradient: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """From gradient = dL/dy [T, out] and h [T, R]: dL/dh [T, R], dL/dB [out, R]."""
    dh = (gradient @ factors.B.detach()).mul_(factors.scaling)
    return dh, (gradient.t() @ h).mul_(factors.scaling)


def as_own(y: Tensor, x: Tensor) -> Tensor:
    """A fresh y [T, out] as [..., out] with x's leading sizes, no view in autograd's eyes: some families
    change a linear's output in place (OLMo clamps q, k and v), which it refuses for views made in a
    Function."""
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


class _FrozenLinearFunction(torch.autograd.Function):
    """See the module docstring; `linear` is an object, A and B are passed so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, linear: FrozenLinear) -> Tensor:
        y, h = linear_forward(linear, x.reshape(-1, x.shape[-1]))
        ctx.linear = linear
        ctx.tokens = linear.factors.tokens_to_drop() if linear.factors is not None else None
        if linear.factors is not None:
            ctx.save_for_backward(x, h)
        return as_own(y, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, h = ctx.saved_tensors or (gradient, None)  # without factors, x is not asked for
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = linear_backward(
            ctx.linear, g, x.reshape(-1, x.shape[-1]), h, ctx.tokens, needs_dx=ctx.needs_input_grad[0]
        )
        return (None if dx is None else dx.view(*gradient.shape[:-1], -1)), None, None, None
