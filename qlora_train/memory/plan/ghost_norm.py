"""RMSNorm with ghost tensors, as the library writes it and as kernels/rms_norm.py does. See ghost.py for
why."""

from __future__ import annotations

from qlora_train.memory.plan import ghost_ops as op
from qlora_train.memory.plan.ghost import Ghost, apply
from qlora_train.memory.plan.ghost_ops import FLOAT32


def fused_norm(x: Ghost) -> Ghost:
    """kernels/rms_norm.py."""
    itemsize = x.itemsize
    wide = op.to(x.detach(), FLOAT32)
    wide.ledger.scratch(wide.num_bytes)  # its square
    scale = x.ledger.tensor((*x.shape[:-1], 1), FLOAT32)
    normed = wide.like()
    del wide
    y = op.to(normed, itemsize)
    del normed

    def run(gradient: Ghost, x: Ghost, scale: Ghost) -> tuple[Ghost]:
        weighted = gradient.like()
        dx = op.to(weighted, FLOAT32)
        del weighted
        wide = op.to(x, FLOAT32)
        normed = wide.like()
        del wide
        normed.ledger.scratch(normed.num_bytes)  # dx * normed
        return (op.to(dx, itemsize),)

    return apply(y, (x,), (x, scale), run)


def liger_norm(x: Ghost, *, is_transposed: bool = False) -> Ghost:
    """kernels/rms_norm.py with liger-kernel's kernels (kernels/liger.py): one pass over x each way, nothing
    in fp32 but a number per row. is_transposed: x is, so that its rows are copied together each time."""

    def rows(x: Ghost) -> Ghost:
        return x.like() if is_transposed else x

    def run(gradient: Ghost, x: Ghost, scale: Ghost) -> tuple[Ghost]:
        copied = rows(x)
        dx = gradient.like()
        del copied
        return (dx,)

    copied = rows(x.detach())
    y, scale = x.like(), x.ledger.tensor((*x.shape[:-1], 1), FLOAT32)
    del copied
    return apply(y, (x,), (x, scale), run)


def rms_norm(x: Ghost) -> Ghost:
    """weight * (x32 * rsqrt(mean(x32^2) + eps)).to(dtype), the weight frozen."""
    itemsize = x.itemsize
    hidden = op.to(x, FLOAT32)
    variance = op.mean(op.square(hidden))
    hidden = op.multiply(hidden, op.rsqrt(op.plus_number(variance)))
    return op.scale(op.to(hidden, itemsize))
