"""The frozen linear with its LoRA factors: y = x W^T + b + s (x A^T) B^T, W quantized and frozen.

Shapes: x [..., T, in], W [out, in], A [R, in], B [out, R], s = alpha / R (or alpha / sqrt(R), rank-stabilised
LoRA, Kalajdzievski 2023, arXiv:2312.03732). QLoRA: Dettmers et al. 2023, arXiv:2305.14314.

Two paths, chosen by `training.kernels`:

- `reference` writes the formula with library operations and lets autograd do the rest. Autograd saves the
  dequantized W (2 in*out bytes in 16 bits) until backward, and puts the factor gradients into `.grad` in the
  compute dtype.
- `auto` is one autograd.Function. Saved for backward: x and h = x A^T, i.e. T (in + R) elements; never W.
  Backward asks the weight source again, so a weight may have left the device in between. With g = dL/dy:

      dB = s g^T h        dh = s g B        dA = dh^T x        dx = g W + dh A

  dA and dB (cheap: 2 T R (in + out) FLOPs each way) are added to the flat fp32 gradient right here, and
  autograd is handed None for them: micro-batches accumulate in fp32, with no gradient tensors of their own.

Why not bitsandbytes' own MatMul4Bit: it keeps the quantized tensor itself on ctx. Once weights stream through
recycled slots that tensor is overwritten before backward, and the gradient is silently wrong.

With dropout, x in the LoRA branch is dropout(x); its mask is a pure function of the token
(kernels/dropout.py) and is computed again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_train.kernels.dropout import DropoutKeys, dropout, keep_mask
from qlora_train.model.weight_store import WeightStore


class DropoutContext:
    """The micro-batch that passes through the layers now; None while evaluating. Shared by all factors."""

    def __init__(self) -> None:
        self.tokens: DropoutKeys | None = None


class LinearLora(nn.Module):
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

    def tokens_to_drop(self) -> DropoutKeys | None:
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
    """A linear layer whose weight is asked from a `WeightStore` at each use.

    name: the module path in the model; `source.dequantize(name, dtype)` gives [out_features, in_features].
    source is set when the model comes alive. skip_output: the output is zeros, while backward stays what it
    is; right only where the output goes straight into the residual sum and only its gradient is wanted.
    """

    bias: nn.Parameter | None
    source: WeightStore

    def __init__(self, name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.name = name
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", None)
        self.lora: LinearLora | None = None
        self.use_autograd = False
        self.skip_output = False

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if not self.use_autograd:
            lora = self.lora
            a, b = (lora.A, lora.B) if lora is not None else (None, None)
            return _FrozenLinearFunction.apply(x, a, b, self)
        y = F.linear(x, self.source.dequantize(self.name, x.dtype), self.bias)
        if self.lora is None:
            return y
        branch = _dropped(x, self.lora)
        return y + F.linear(F.linear(branch, self.lora.A), self.lora.B) * self.lora.scaling

    def extra_repr(self) -> str:
        return f"{self.name}: {self.in_features} -> {self.out_features}"


def _dropped(x: Tensor, lora: LinearLora) -> Tensor:
    tokens = lora.tokens_to_drop()
    if tokens is None:
        return x
    return dropout(x, tokens, lora.module_id, lora.dropout_probability)


def linear_forward(linear: FrozenLinear, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x [T, in] -> (y [T, out], h [T, R] for `linear_backward`, None without factors). For use inside a
    Function: nothing is recorded. Where `skip_output` is set, y is zeros. h: x A^T where it is known."""
    if linear.skip_output:
        y = x.new_zeros(()).expand(len(x), linear.out_features)
    else:
        y = F.linear(x, linear.source.dequantize(linear.name, x.dtype), linear.bias)
    lora = linear.lora
    if lora is None:
        return y, None
    if h is None:
        h = F.linear(_dropped(x, lora), lora.A)
    if not linear.skip_output:
        y.addmm_(h, lora.B.t(), alpha=lora.scaling)
    return y, h


def linear_backward(
    linear: FrozenLinear,
    gradient: Tensor,
    x: Tensor,
    h: Tensor | None,
    tokens: DropoutKeys | None,
    *,
    needs_dx: bool = True,
    add_to: Tensor | None = None,
) -> Tensor | None:
    """From gradient = dL/dy [T, out] to dL/dx [T, in], None where it is not needed; factor gradients are
    added where they belong.

    x [T, in]: the input. h: what `linear_forward` returned, or None: computed again. tokens: those of the
    forward pass, if anything was dropped. onto: a tensor that dL/dx is added to and that is returned.
    """
    grad_input = grad_input_of_weight(linear, gradient, add_to) if needs_dx else None
    lora = linear.lora
    if lora is None:
        return grad_input
    a, kept = lora.A.detach(), None
    if tokens is not None:
        mask = keep_mask(tokens, lora.module_id, linear.in_features, lora.dropout_probability)
        kept = mask.to(x.dtype).mul_(1.0 / (1.0 - lora.dropout_probability))
        x = x * kept
    if h is None:
        h = F.linear(x, a)
    dh, gradient_b = grad_of_low_rank(lora, gradient, h)
    lora.add_gradients(dh.t() @ x, gradient_b)
    del gradient_b
    if grad_input is not None:
        grad_input = grad_input.addmm_(dh, a) if kept is None else grad_input.add_((dh @ a).mul_(kept))
    return grad_input


def grad_input_of_weight(linear: FrozenLinear, gradient: Tensor, add_to: Tensor | None) -> Tensor:
    """gradient W [T, in], added to `add_to` where it is given."""
    weight = linear.source.dequantize(linear.name, gradient.dtype)
    return gradient @ weight if add_to is None else add_to.addmm_(gradient, weight)


def grad_of_low_rank(lora: LinearLora, gradient: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """From gradient = dL/dy [T, out] and h [T, R]: dL/dh [T, R], dL/dB [out, R]."""
    dh = (gradient @ lora.B.detach()).mul_(lora.scaling)
    return dh, (gradient.t() @ h).mul_(lora.scaling)


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
        ctx.tokens = linear.lora.tokens_to_drop() if linear.lora is not None else None
        if linear.lora is not None:
            ctx.save_for_backward(x, h)
        return as_own(y, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, h = ctx.saved_tensors or (gradient, None)  # without factors, x is not asked for
        g = gradient.reshape(-1, gradient.shape[-1])
        grad_input = linear_backward(
            ctx.linear, g, x.reshape(-1, x.shape[-1]), h, ctx.tokens, needs_dx=ctx.needs_input_grad[0]
        )
        return (None if grad_input is None else grad_input.view(*gradient.shape[:-1], -1)), None, None, None
