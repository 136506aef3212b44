"""xIELU (apertus) with ghost tensors: transformers' XIELUActivation in plain operations, each of which saves
its own. See ghost.py for why.

The package `xielu` has a kernel for GPUs that saves less; it is no dependency, so this is the most.
"""

from __future__ import annotations

from qlora_train.memory.plan import ghost_ops as op
from qlora_train.memory.plan.ghost import Ghost, apply
from qlora_train.memory.plan.ghost_ops import BOOL


def xielu(x: Ghost) -> Ghost:
    """where(x > 0, p x x + b x, (expm1(min(x, eps)) - x) n + b x), p, n, b and eps frozen."""
    positive = x.ledger.tensor(x.shape, BOOL)
    above = op.add(op.multiply(op.scale(x), x), op.scale(x))
    below = op.scale(op.subtract(_expm1(_minimum_with_number(x)), x))
    return _where(positive, above, op.add(below, op.scale(x)))


def _expm1(x: Ghost) -> Ghost:
    result = x.like()

    def backward(g: Ghost, saved: Ghost) -> tuple[Ghost]:
        plus_one = saved.like()
        gradient = g.like()
        del plus_one
        return (gradient,)

    return apply(result, (x,), (result,), backward)


def _minimum_with_number(x: Ghost) -> Ghost:
    """torch.min(x, frozen): half the gradient where both are equal, none where x is larger."""

    def backward(g: Ghost, saved: Ghost) -> tuple[Ghost]:
        equal = g.ledger.tensor(g.shape, BOOL)
        half = g.like()
        gradient = g.like()
        del equal, half
        gradient.ledger.scratch(gradient.num_bytes // gradient.itemsize)  # where x is larger
        return (gradient,)

    return apply(x.like(), (x,), (x,), backward)


def _where(condition: Ghost, a: Ghost, b: Ghost) -> Ghost:
    return apply(a.like(), (a, b), (condition,), lambda g, saved: (g.like(), g.like()))
