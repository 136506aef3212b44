"""The frozen linear with its LoRA parameters A and B: y = x W^T + b + s (x A^T) B^T, W quantized.

Shapes: x [..., T, in], W [out, in], A [R, in], B [out, R], s = alpha / R (or alpha / sqrt(R), rank-stabilized
LoRA, Kalajdzievski 2023, arXiv:2312.03732). QLoRA: Dettmers et al. 2023, arXiv:2305.14314.

Two paths, chosen by `training.kernels`:

- `reference` is the formula in library operations with autograd. Autograd saves the dequantized W (2 in*out
  bytes in 16 bits) until backward, and puts the gradients of A and B into `.grad` in the compute dtype.
- `auto` is one autograd.Function. Saved for backward: x and h = x A^T, i.e. T (in + R) elements; never W.
  Backward dequantizes W again, so the weight may leave the device in between. With g = dL/dy:

      dB = s g^T h        dh = s g B        dA = dh^T x        dx = g W + dh A

  dA and dB (2 T R (in + out) FLOPs) are added to the flat fp32 gradient here, and autograd gets None for
  them: micro-batches accumulate in fp32, without gradient tensors of their own.

Why not bitsandbytes' own MatMul4Bit: it keeps the quantized tensor itself on ctx. If weights are streamed
through reused slots, that tensor is overwritten before backward, and the gradient is silently wrong.

With `lora_bias`, y += s b, where b [out] is trained: db = s sum_t g. With DoRA, y without its bias is scaled
row by row (model/magnitude.py).

With dropout, x in the LoRA branch is dropout(x); the mask is a pure function of the token
(kernels/dropout.py) and is recomputed in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_train.kernels.dropout import DropoutKeys, dropout, keep_mask
from qlora_train.model.magnitude import Magnitude
from qlora_train.model.weight_store import WeightStore


class DropoutContext:
    """The dropout keys of the current micro-batch, shared by all LoRA modules; None: nothing is dropped."""

    def __init__(self) -> None:
        self.tokens: DropoutKeys | None = None


class LinearLora(nn.Module):
    """The LoRA parameters A [R, in] and B [out, R] of one linear, or of a matrix of all experts
    (expert_lora.py): views of the flat working copy.

    With its magnitude or bias they are the only trainable parameters. gradient_a, gradient_b: views of the
    flat fp32 gradient. scaling: s. module_id: distinguishes the dropout masks of the linears. magnitude:
    DoRA's, or None. bias: (b [out], its gradient) with `lora_bias`, or None.
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
        magnitude: Magnitude | None = None,
        bias: tuple[Tensor, Tensor] | None = None,
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
        self.magnitude = magnitude
        self.bias = None if bias is None else nn.Parameter(bias[0])
        self.gradient_bias = None if bias is None else bias[1]

    def tokens_to_drop(self) -> DropoutKeys | None:
        """The dropout keys, or None if nothing is dropped (evaluation, probability 0)."""
        return self.context.tokens if self.dropout_probability > 0 else None

    def add_gradients(self, gradient_a: Tensor, gradient_b: Tensor) -> None:
        """Add one micro-batch's gradients to the flat fp32 gradient."""
        self.gradient_a.add_(gradient_a)
        self.gradient_b.add_(gradient_b)

    def collect_autograd(self) -> None:
        """Add the `.grad` of A, B and m (reference path) to the flat fp32 gradient and clear it."""
        if self.A.grad is not None and self.B.grad is not None:
            self.add_gradients(self.A.grad, self.B.grad)
            self.A.grad = self.B.grad = None
        if self.gradient_bias is not None and self.bias is not None and self.bias.grad is not None:
            self.gradient_bias.add_(self.bias.grad)
            self.bias.grad = None
        if self.magnitude is not None and self.magnitude.m.grad is not None:
            self.magnitude.gradient.add_(self.magnitude.m.grad)
            self.magnitude.m.grad = None


class FrozenLinear(nn.Module):
    """A linear layer that gets its weight from a `WeightStore` at each use.

    name: the module path in the model; `source.dequantize(name, dtype)` returns [out_features, in_features].
    source: set when the model is materialized. lora: None without LoRA parameters. use_autograd: the
    `reference` path. skip_output: forward returns zeros and backward is unchanged; correct only if the output
    goes straight into the residual sum and only gradients are needed.
    """

    num_matrices = 1
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
        weight, lora = self.source.dequantize(self.name, x.dtype), self.lora
        y = F.linear(x, weight, self.bias)
        if lora is None:
            return y
        y = y + F.linear(F.linear(_dropped(x, lora), lora.A), lora.B, lora.bias) * lora.scaling
        if lora.magnitude is None:
            return y
        lora.magnitude.refresh(weight, lora.A, lora.B, lora.scaling)
        return y + (y if self.bias is None else y - self.bias) * lora.magnitude.factor(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.name}: {self.in_features} -> {self.out_features}"


def _dropped(x: Tensor, lora: LinearLora) -> Tensor:
    tokens = lora.tokens_to_drop()
    if tokens is None:
        return x
    return dropout(x, tokens, lora.module_id, lora.dropout_probability)


def linear_forward(linear: FrozenLinear, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Forward pass inside an autograd.Function: x [T, in] -> (y [T, out], h [T, R] for `linear_backward`).

    The returned h is None without LoRA parameters. With `skip_output`, y is zeros. h: x A^T if it is already
    computed."""
    lora = linear.lora
    magnitude = None if lora is None else lora.magnitude
    if linear.skip_output:
        y = x.new_zeros(()).expand(len(x), linear.out_features)
    else:
        weight = linear.source.dequantize(linear.name, x.dtype)
        if lora is not None and magnitude is not None:
            magnitude.refresh(weight, lora.A, lora.B, lora.scaling)
        y = F.linear(x, weight, linear.bias)
    if lora is None:
        return y, None
    if h is None:
        h = F.linear(_dropped(x, lora), lora.A)
    if not linear.skip_output:
        y.addmm_(h, lora.B.t(), alpha=lora.scaling)
        if lora.bias is not None:
            y.add_(lora.bias, alpha=lora.scaling)
        if magnitude is not None:
            magnitude.scale_(y, linear.bias)
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
    """Backward pass: from gradient = dL/dy [T, out] to dL/dx [T, in], adding dA and dB to the flat gradient.

    Returns None unless `needs_dx`. x [T, in]: the input. h: from `linear_forward`; None: recomputed. tokens:
    the dropout keys of the forward pass; None: nothing was dropped. add_to: a tensor [T, in] that dL/dx is
    added to in place and that is returned.
    """
    lora = linear.lora
    if lora is None:
        return backward_of_weight(linear, gradient, x, h, add_to, needs_dx=needs_dx)[0]
    a, factors = lora.A.detach(), None
    if tokens is not None:
        mask = keep_mask(tokens, lora.module_id, linear.in_features, lora.dropout_probability)
        factors = mask.to(x.dtype).mul_(1.0 / (1.0 - lora.dropout_probability))
        x = x * factors
    if h is None:
        h = F.linear(x, a)
    grad_input, gradient = backward_of_weight(linear, gradient, x, h, add_to, needs_dx=needs_dx)
    dh, gradient_b = grad_of_low_rank(lora, gradient, h)
    lora.add_gradients(dh.t() @ x, gradient_b)
    del gradient_b
    if grad_input is not None:
        grad_input = grad_input.addmm_(dh, a) if factors is None else grad_input.add_((dh @ a).mul_(factors))
    return grad_input


def backward_of_weight(
    linear: FrozenLinear,
    gradient: Tensor,
    x: Tensor,
    h: Tensor | None,
    add_to: Tensor | None,
    *,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """From gradient = dL/dy [T, out]: (its product with W [T, in], added to `add_to` in place if that is
    given; the gradient [T, out] that reaches the LoRA branch).

    Without `needs_dx` the product is None. With DoRA, the gradient that arrives is scaled by c first, and dm,
    which x [T, in] and h [T, R] are for, is added to the flat gradient."""
    magnitude = None if linear.lora is None else linear.lora.magnitude
    if magnitude is None and not needs_dx:
        return None, gradient
    weight = linear.source.dequantize(linear.name, gradient.dtype)
    if linear.lora is not None and magnitude is not None:
        assert h is not None
        p = F.linear(x, weight).addmm_(h, linear.lora.B.detach().t(), alpha=linear.lora.scaling)
        gradient = magnitude.backward(gradient, p)
    if not needs_dx:
        return None, gradient
    return gradient @ weight if add_to is None else add_to.addmm_(gradient, weight), gradient


def grad_of_low_rank(lora: LinearLora, gradient: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """From gradient = dL/dy [T, out] and h [T, R]: dL/dh [T, R], dL/dB [out, R]. Adds dL/db, if there is a
    bias, to the flat gradient."""
    if lora.gradient_bias is not None:
        ones = gradient.new_ones(1, len(gradient))
        lora.gradient_bias.add_((ones @ gradient).squeeze(0), alpha=lora.scaling)
    dh = (gradient @ lora.B.detach()).mul_(lora.scaling)
    return dh, (gradient.t() @ h).mul_(lora.scaling)


def as_own(y: Tensor, x: Tensor) -> Tensor:
    """Reshape a new y [T, out] to [..., out] with x's leading sizes, without a view in autograd's sense.

    Some families modify a linear's output in place (OLMo clamps q, k and v), which autograd refuses for views
    made in a Function."""
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


class _FrozenLinearFunction(torch.autograd.Function):
    """The `auto` path of a linear; A and B are passed so that the output requires a gradient."""

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
        x, h = ctx.saved_tensors or (gradient, None)  # without LoRA parameters, x is not used
        g = gradient.reshape(-1, gradient.shape[-1])
        grad_input = linear_backward(
            ctx.linear, g, x.reshape(-1, x.shape[-1]), h, ctx.tokens, needs_dx=ctx.needs_input_grad[0]
        )
        return (None if grad_input is None else grad_input.view(*gradient.shape[:-1], -1)), None, None, None
