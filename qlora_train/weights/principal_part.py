"""The principal part of a weight: the singular vectors of its largest singular values.

The decomposition is exact (LAPACK, cuSOLVER), or by subspace iteration (Halko et al. 2011, arXiv:0909.4061):
a random sketch, drawn on the CPU so that it is the same on every device, is multiplied by W W^T n times. Then
the part is not quite the best of its rank: of W with singular values S, its error is S_(r+1) times a factor
that goes to 1 as (sqrt(in))^(1 / (2 n + 1)). W is its part and the residual in either case.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEED = 0


def principal_part(weight: Tensor, rank: int, num_iterations: int | None) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], whose product is the principal part of a weight [out, in] in fp32, with
    half of the singular values in each. num_iterations: None: exact."""
    if num_iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = _by_subspace(weight, rank, num_iterations)
    root = s[:rank].sqrt()
    return (vh[:rank] * root[:, None]).contiguous(), (u[:, :rank] * root).contiguous()


def principal_part_bytes(shape: tuple[int, int], rank: int, num_iterations: int | None) -> int:
    """Bytes on the device of a weight in fp32 and of its decomposition, at the most."""
    out, columns = shape
    smaller = min(shape)
    if num_iterations is None:  # two copies of the weight, U and V, and the workspace of divide and conquer
        return 4 * (3 * out * columns + smaller * (out + columns) + 4 * smaller * smaller)
    return 4 * (out * columns + 6 * rank * (out + columns))


def principal_part_flops(shape: tuple[int, int], rank: int, num_iterations: int | None) -> float:
    """Operations of the decomposition of a weight."""
    out, columns = shape
    if num_iterations is None:
        return 14.0 * max(shape) * min(shape) ** 2 + 8.0 * min(shape) ** 3
    return 2.0 * out * columns * rank * (2 * num_iterations + 3)


def _by_subspace(weight: Tensor, rank: int, num_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    sketch = torch.randn(weight.shape[1], rank, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ sketch).Q
    for _ in range(num_iterations):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    return basis @ u, s, vh
