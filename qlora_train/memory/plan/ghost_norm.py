"""Norms with ghost tensors, as the library's modules write them and as kernels/rms_norm.py does. See ghost.py
for why."""

from __future__ import annotations

from qlora_train.memory.plan import ghost_ops as op
from qlora_train.memory.plan.families import Norm
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


def library_norm(x: Ghost, kind: Norm) -> Ghost:
    """As the family's own module writes it; the weight is frozen."""
    return {
        "rms": rms_norm,
        "wide_rms": wide_rms_norm,
        "layer": op.layer_norm,
        "wide_layer": wide_layer_norm,
        "mean_free": mean_free_norm,
    }[kind](x)


def rms_norm(x: Ghost) -> Ghost:
    """weight * (x32 * rsqrt(mean(x32^2) + eps)).to(dtype)."""
    return op.scale(op.to(_normed(op.to(x, FLOAT32)), x.itemsize))


def wide_rms_norm(x: Ghost) -> Ghost:
    """(weight * x32 * rsqrt(mean(x32^2) + eps)).to(dtype)."""
    return op.to(op.scale(_normed(op.to(x, FLOAT32))), x.itemsize)


def _normed(hidden: Ghost) -> Ghost:
    variance = op.mean(op.square(hidden))
    return op.multiply(hidden, op.rsqrt(op.plus_number(variance)))


def wide_layer_norm(x: Ghost) -> Ghost:
    """olmo: F.layer_norm(x32).to(dtype)."""
    return op.to(op.layer_norm(op.to(x, FLOAT32)), x.itemsize)


def mean_free_norm(x: Ghost) -> Ghost:
    """cohere: the mean is taken off twice, in operations of their own."""
    hidden = op.to(x, FLOAT32)
    average = op.mean(hidden)
    variance = op.mean(op.square(op.subtract(hidden, average)))
    hidden = op.multiply(op.subtract(hidden, average), op.rsqrt(op.plus_number(variance)))
    hidden = op.scale(hidden)
    return op.to(hidden, x.itemsize)
