"""DoRA: the trained magnitude of a linear's rows (Liu et al. 2024, arXiv:2402.09353).

    y = c (x W^T + s (x A^T) B^T) + b       c = m / n       n_i = |W_i + s B_i A|

m [out] is trained; it begins as n. n [out], the row norms, is a constant in backward, as in the paper (4.3)
and in PEFT. Its square is computed without the sum W + s B A, from products of rank R:

    n_i^2 = |W_i|^2 + s (2 (W A^T)_i + s B_i (A A^T)) . B_i

|W_i|^2 is a constant of the base. n changes once per optimizer step; it is computed when W is dequantized
anyway, for the first forward pass after the change. Cost: 2 in out R FLOPs per linear and step.

c is near 1, where 16 bits are coarse: y is scaled by y += (c - 1) (y - b), with c - 1 from fp32. At the start
c - 1 is 0, and the adapted model gives the base's bits.

Backward needs p = x W^T + s h B^T, h = x A^T, and computes it again instead of saving T out elements per
linear: 2 T in out FLOPs, one tensor [T, out] at a time. With g = dL/dy:

    dm = sum_t g p / n        dL/dp = c g, from where on everything is as without DoRA
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_ELEMENTS = 2**20  # of W in fp32 at a time: 4 MiB


class Magnitude(nn.Module):
    """m, n and |W_i|^2 of one linear, [out] in fp32 each: views of flat buffers.

    m: a view of the masters; NaN until the base is measured becomes n. gradient: that of m. row_norms: n.
    base_squares: |W_i|^2. is_measured: whether base_squares are known. is_stale: whether A or B have changed
    since n was computed.
    """

    def __init__(self, m: Tensor, gradient: Tensor, row_norms: Tensor, base_squares: Tensor) -> None:
        super().__init__()
        # .data: autograd, which has saved other linears' parts of the buffers, does not take them for changed
        self.m, self.row_norms = nn.Parameter(m.data), row_norms.data
        self.gradient, self.base_squares = gradient, base_squares
        self.is_measured, self.is_stale = False, True

    @torch.no_grad()
    def refresh(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
        """Compute n, if A or B have changed. weight: W [out, in], dequantized."""
        if not self.is_stale:
            return
        if not self.is_measured:
            self.base_squares.copy_(_row_squares(weight))
        projected, b_gram = F.linear(weight, a).float(), (b @ (a @ a.t())).float()
        cross = projected.mul_(2).add_(b_gram, alpha=scaling).mul_(b).sum(1)
        torch.add(self.base_squares, cross, alpha=scaling, out=self.row_norms).sqrt_()
        if not self.is_measured:
            self.m.copy_(torch.where(self.m.isnan(), self.row_norms, self.m))
        self.is_measured, self.is_stale = True, False

    def factor(self, dtype: torch.dtype) -> Tensor:
        """c - 1 [out]."""
        return ((self.m - self.row_norms) / self.row_norms).to(dtype)

    def scale_(self, y: Tensor, bias: Tensor | None) -> None:
        """Scale y [T, out] by c in place, without the bias [out] that it contains."""
        factor = self.factor(y.dtype)
        y.addcmul_(y, factor)
        if bias is not None:
            y.sub_(factor.mul_(bias))

    def backward(self, gradient: Tensor, p: Tensor) -> Tensor:
        """From gradient = dL/dy and p, [T, out] each, to dL/dp, which overwrites p; adds dm."""
        ones = p.new_ones(1, len(p))
        self.gradient.add_((ones @ p.mul_(gradient)).squeeze(0) / self.row_norms)
        return torch.addcmul(gradient, gradient, self.factor(gradient.dtype), out=p)


def _row_squares(weight: Tensor) -> Tensor:
    """|W_i|^2 [out] in fp32, a few rows of W at a time."""
    num_rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    return torch.cat([rows.to(torch.float32, copy=True).square_().sum(1) for rows in weight.split(num_rows)])
