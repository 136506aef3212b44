"""Rotary embedding and attention over packed documents with ghost tensors: model/attention.py, statement by
statement. See ghost.py for why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_train.memory.plan import ghost_ops as op
from qlora_train.memory.plan.ghost import Ghost, apply

INT64 = 8


def rotated(q: Ghost) -> Ghost:
    """q * cos + rotate_half(q) * sin."""
    straight = op.scale(q)
    return op.add(straight, op.scale(_rotate_half(q)))


def _rotate_half(q: Ghost) -> Ghost:
    half = q.shape[-1] // 2
    x1, x2 = op.part(q, half), op.part(q, q.shape[-1] - half)
    return op.concatenate((op.scale(x2), x1), dim=-1)


def padded_length(length: int) -> int:
    """What a document is padded to (model/attention.py)."""
    unit = max(16, 2 ** (length.bit_length() - 1) // 4)
    return -(-length // unit) * unit


def buckets(documents: Sequence[int]) -> Mapping[int, int]:
    """Padded length -> how many documents have it, in ascending order."""
    counts: dict[int, int] = {}
    for length in documents:
        counts[padded_length(length)] = counts.get(padded_length(length), 0) + 1
    return dict(sorted(counts.items()))


def by_document(
    query: Ghost, key: Ghost, value: Ghost, documents: Sequence[int], window: int | None
) -> Ghost:
    """model/attention.py: gather documents into batches, attend, gather back."""
    rows = [_rows(t) for t in (query, key, value)]
    outputs = []
    for length, number in buckets(documents).items():
        q, k, v = (_batch(t, number, length) for t in rows)
        attended = _causal(q, k, v, window)
        outputs.append(attended.view(number * length, q.shape[1], q.shape[3]))
    together = op.concatenate(outputs, dim=0)
    num_tokens, num_heads, head_dim = sum(documents), query.shape[1], query.shape[3]
    result = op.gather(together, (num_tokens, num_heads, head_dim))
    return result.view(1, num_tokens, num_heads * head_dim)


def _rows(t: Ghost) -> Ghost:
    """[1, heads, T, d] -> [T, heads, d]."""
    _, num_heads, num_tokens, head_dim = t.shape
    return op.first(t).view(num_tokens, num_heads, head_dim)


def _batch(t: Ghost, number: int, length: int) -> Ghost:
    """[T, heads, d] -> [documents, heads, length, d]."""
    _, num_heads, head_dim = t.shape
    return op.gather(t, (number, length, num_heads, head_dim)).view(number, num_heads, length, head_dim)


def _causal(q: Ghost, k: Ghost, v: Ghost, window: int | None) -> Ghost:
    length = q.shape[2]
    if window is None or length <= window:
        return op.scaled_dot_product_attention(q, k, v)
    blocks = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        num_queries, num_keys, ledger = stop - start, stop - first, q.ledger
        ledger.scratch(num_queries * num_keys * (INT64 + 3))
        mask = ledger.tensor((num_queries * num_keys,), 1 + q.itemsize)
        q_part = _tokens(q, num_queries)
        k_part, v_part = _tokens(k, num_keys), _tokens(v, num_keys)
        blocks.append(op.scaled_dot_product_attention(q_part, k_part, v_part))
        del mask
    return op.concatenate(blocks, dim=2)


def _tokens(t: Ghost, size: int) -> Ghost:
    """t[:, :, a:b]."""
    shape = t.shape
    view = Ghost(t.storage, (shape[0], shape[1], size, shape[3]), t.itemsize)
    return apply(view, (t,), (), lambda g: (g.ledger.tensor(shape, g.itemsize),))
