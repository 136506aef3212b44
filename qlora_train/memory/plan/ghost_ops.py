"""What torch operations allocate, save and allocate again on the way back, for ghost tensors (ghost.py).

Each function is named after the operation. Learned by tracing torch 2.13 on the CPU; the test that compares
plans with the meter (tests/memory/plan/test_plan_matches_meter.py) fails where a version does otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_train.memory.plan.ghost import Ghost, Ledger, apply

FLOAT32, BOOL = 4, 1


def add(a: Ghost, b: Ghost) -> Ghost:
    """Saves nothing; both inputs get the gradient itself."""
    return apply(a.like(), (a, b), (), lambda g: (g, g))


def multiply(a: Ghost, b: Ghost) -> Ghost:
    """Shapes broadcast. Saves b if a needs a gradient, and a if b does."""
    shape = tuple(max(x, y) for x, y in zip(a.shape, b.shape, strict=True))
    result = a.ledger.tensor(shape, max(a.itemsize, b.itemsize))
    needs = (a.node is not None, b.node is not None)
    shapes = (a.shape, b.shape)

    def backward(g: Ghost, *saved: Ghost) -> tuple[Ghost | None, Ghost | None]:
        return tuple(_product_to(g, shapes[i]) if needs[i] else None for i in range(2))  # type: ignore[return-value]

    saved = [x for x, needed in ((b, needs[0]), (a, needs[1])) if needed]
    return apply(result, (a, b), saved, backward)


def _product_to(g: Ghost, shape: tuple[int, ...]) -> Ghost:
    """g times something, summed over what was broadcast."""
    product = g.like()
    return product if product.shape == shape else g.ledger.tensor(shape, g.itemsize)


def scale(x: Ghost, *by: Ghost) -> Ghost:
    """Times (or plus) a number or a frozen vector, which is saved where it is given: nothing of x is."""
    return apply(x.like(), (x,), by, lambda g, *saved: (g.like(),))


def subtract(a: Ghost, b: Ghost) -> Ghost:
    """Shapes broadcast; the second gradient is negated, then summed."""
    shape = b.shape

    def backward(g: Ghost) -> tuple[Ghost, Ghost]:
        negated = g.like()
        return g, negated if negated.shape == shape else g.ledger.tensor(shape, g.itemsize)

    return apply(a.like(), (a, b), (), backward)


def layer_norm(x: Ghost) -> Ghost:
    """F.layer_norm over the last dimension: saves x, a mean and a scale per row."""
    statistics = x.ledger.tensor((*x.shape[:-1], 2), x.itemsize)
    return apply(x.like(), (x,), (x, statistics), lambda g, *saved: (g.like(),))


def tanh(x: Ghost) -> Ghost:
    result = x.like()
    return apply(result, (x,), (result,), lambda g, saved: (g.like(),))


def softmax(x: Ghost) -> Ghost:
    result = x.like()
    return apply(result, (x,), (result,), lambda g, saved: (g.like(),))


def masked_fill(x: Ghost, mask: Ghost) -> Ghost:
    return apply(x.like(), (x,), (mask,), lambda g, saved: (g.like(),))


def copied(x: Ghost) -> Ghost:
    """A reshape that must copy: its gradient is a view."""
    return apply(x.like(), (x,), (), lambda g: (g,))


def product(a: Ghost, b: Ghost, num_columns: int) -> Ghost:
    """a [N, heads, n, k] @ b: [N, heads, n, num_columns]; saves both."""
    result = a.ledger.tensor((*a.shape[:3], num_columns), a.itemsize)
    return apply(result, (a, b), (a, b), lambda g, a, b: (a.like(), b.like()))


def plus_number(x: Ghost) -> Ghost:
    return apply(x.like(), (x,), (), lambda g: (g,))


def to(x: Ghost, itemsize: int) -> Ghost:
    """A copy in another dtype; x itself if it has that one."""
    if x.itemsize == itemsize:
        return x
    before = x.itemsize
    result = x.ledger.tensor(x.shape, itemsize)
    return apply(result, (x,), (), lambda g: (g.ledger.tensor(g.shape, before),))


def square(x: Ghost) -> Ghost:
    """x.pow(2)."""

    def backward(g: Ghost, saved: Ghost) -> tuple[Ghost]:
        first_power, doubled = saved.like(), saved.like()
        result = g.like()
        del first_power, doubled
        return (result,)

    return apply(x.like(), (x,), (x,), backward)


def mean(x: Ghost) -> Ghost:
    """Over the last dimension, kept as 1."""
    shape = x.shape
    result = x.ledger.tensor((*shape[:-1], 1), x.itemsize)
    return apply(result, (x,), (), lambda g: (g.ledger.tensor(shape, g.itemsize),))


def rsqrt(x: Ghost) -> Ghost:
    result = x.like()

    def backward(g: Ghost, saved: Ghost) -> tuple[Ghost]:
        cube, half = saved.like(), saved.like()
        gradient = g.like()
        del cube, half
        return (gradient,)

    return apply(result, (x,), (result,), backward)


def activation(x: Ghost) -> Ghost:
    """silu or gelu: saves its input."""
    return apply(x.like(), (x,), (x,), lambda g, saved: (g.like(),))


def part(x: Ghost, size: int) -> Ghost:
    """x[..., a:b] with `size` elements in the last dimension: a view, whose gradient is padded with zeros."""
    shape = x.shape
    view = Ghost(x.storage, (*shape[:-1], size), x.itemsize)
    return apply(view, (x,), (), lambda g: (g.ledger.tensor(shape, g.itemsize),))


def concatenate(parts: Sequence[Ghost], dim: int) -> Ghost:
    """Always a copy; gradients are views."""
    shapes = [x.shape for x in parts]
    shape = list(shapes[0])
    shape[dim] = sum(s[dim] for s in shapes)
    result = parts[0].ledger.tensor(shape, parts[0].itemsize)
    return apply(result, parts, (), lambda g: tuple(Ghost(g.storage, s, g.itemsize) for s in shapes))


def heads(x: Ghost, num_heads: int) -> Ghost:
    """x.view(1, T, heads, d).transpose(1, 2) of [1, T, heads * d]: its gradient is copied into the plain
    order."""
    _, num_tokens, width = x.shape
    view = Ghost(x.storage, (1, num_heads, num_tokens, width // num_heads), x.itemsize)
    shape = x.shape
    if num_heads == 1 or num_tokens == 1:
        return apply(view, (x,), (), lambda g: (Ghost(g.storage, shape, g.itemsize),))
    return apply(view, (x,), (), lambda g: (g.ledger.tensor(shape, g.itemsize),))


def scaled_dot_product_attention(q: Ghost, k: Ghost, v: Ghost, *mask: Ghost) -> Ghost:
    """[N, heads, n, d]: saves q, k, v, the mask if there is one, the result and a log-sum-exp per query."""
    return apply(*attention_node(q, k, v, *mask), lambda g, *saved: tuple(x.like() for x in saved[:3]))


def attention_node(
    q: Ghost, k: Ghost, v: Ghost, *mask: Ghost
) -> tuple[Ghost, tuple[Ghost, ...], tuple[Ghost, ...]]:
    """(result, inputs, saved) of a fused attention."""
    result = q.like()
    log_sums = q.ledger.tensor(q.shape[:3], FLOAT32)
    return result, (q, k, v), (q, k, v, *mask, result, log_sums)


def written_out(x: Ghost, num_heads: int) -> Ghost:
    """x.repeat_interleave(groups, dim=1) of [N, key heads, n, d]: its gradient is summed over the groups."""
    shape = x.shape
    result = x.ledger.tensor((shape[0], num_heads, *shape[2:]), x.itemsize)
    return apply(result, (x,), (), lambda g: (g.ledger.tensor(shape, g.itemsize),))


def scratch_of_dropout_mask(ledger: Ledger, num_tokens: int, num_features: int) -> None:
    """What kernels/dropout.py needs to compute one mask: three int32 [T, in] at a time, and the keys."""
    ledger.scratch(12 * num_tokens * num_features + 8 * (num_tokens + num_features))
