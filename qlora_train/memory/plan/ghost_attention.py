"""Rotary embedding and attention over packed documents with ghost tensors: model/attention.py, statement by
statement. See ghost.py for why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from qlora_train.device.description import DeviceDescription
from qlora_train.memory.plan import ghost_ops as op
from qlora_train.memory.plan.families import Rotary
from qlora_train.memory.plan.ghost import Ghost, apply
from qlora_train.memory.plan.ghost_flash import (
    gradients_with_scratch,
    sdpa_scratch_bytes,
    varlen_attention,
)
from qlora_train.memory.plan.ghost_ops import BOOL, FLOAT32

INT64 = 8
BLOCK_QUERIES, LONGEST = 64, 512
"""Of kernels/blocked_attention.py."""


def with_rotary(query: Ghost, key: Ghost, kind: Rotary, window: int | None) -> tuple[Ghost, Ghost]:
    """Both rotated, as the family does it in a layer with this window."""
    if kind == "plain":
        return _rotated(query), _rotated(key)
    if kind in ("interleaved", "half_interleaved"):  # cos and sin of this layer alone, kept by its graph
        size = query.shape[3] // (1 if kind == "interleaved" else 2)
        tables = query.ledger.tensor((2, query.shape[2], size), query.itemsize)
        return _rotated(query, tables), _rotated(key, tables)
    if kind == "where_windowed" and window is None:
        return query, key
    wide_query, wide_key = op.to(query, FLOAT32), op.to(key, FLOAT32)
    rotated_query = _rotated(wide_query)
    rotated_key = _rotated(wide_key)
    return op.to(rotated_query, query.itemsize), op.to(rotated_key, key.itemsize)


def _rotated(q: Ghost, *tables: Ghost) -> Ghost:
    """q * cos + rotate_half(q) * sin."""
    straight = op.scale(q, *tables)
    return op.add(straight, op.scale(_rotate_half(q), *tables))


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


@dataclass(frozen=True)
class AttentionRule:
    """What decides how a layer attends. documents: tokens of each. window: how far back a query sees.
    has_softcap: scores are capped with tanh. heads_outside: q and k lie in memory head by head, as liger's
    norms write them. reference: by document, with SDPA. target, deterministic: where and how it runs.
    most_documents: in any micro-batch; the fewest are those of this one."""

    documents: tuple[int, ...]
    window: int | None
    has_softcap: bool
    heads_outside: bool
    reference: bool
    target: DeviceDescription
    deterministic: bool
    most_documents: int

    @property
    def blocked(self) -> bool:
        """Short documents go through kernels/blocked_attention.py."""
        return self.target.blocks_documents and not (self.reference or self.has_softcap)


def packed_attention(query: Ghost, key: Ghost, value: Ghost, rule: AttentionRule) -> Ghost:
    """q, k, v [1, heads, T, d] -> [1, T, heads * d], by the path that the target takes."""
    grouped, size = query.shape[1] != key.shape[1], query.shape[3]
    if not rule.reference and rule.target.varlen_serves(
        query.itemsize, size, grouped=grouped, has_softcap=rule.has_softcap
    ):
        return varlen_attention(
            query,
            key,
            value,
            len(rule.documents),
            rule.most_documents,
            rule.target,
            deterministic=rule.deterministic,
            heads_outside=rule.heads_outside,
        )
    return by_document(query, key, value, rule)


def by_document(query: Ghost, key: Ghost, value: Ghost, rule: AttentionRule) -> Ghost:
    """model/attention.py: documents into batches (kernels/document_batches.py), attend, and back."""
    classes = buckets(rule.documents)
    (_, num_heads, num_tokens, _), value_dim = query.shape, value.shape[3]
    is_view = [length * number for length, number in classes.items()] == [num_tokens]
    parts = [_taken_apart(t, classes, is_view) for t in (query, key, value)]
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        attended = _causal(q, k, v, rule)
        outputs.append(attended.view(q.shape[0] * q.shape[2], num_heads, value_dim))
    del parts
    result = outputs[0] if is_view else _put_together(outputs, (num_tokens, num_heads, value_dim))
    return result.view(1, num_tokens, num_heads * value_dim)


def _taken_apart(t: Ghost, classes: Mapping[int, int], is_view: bool) -> tuple[Ghost, ...]:
    """[1, heads, T, d] -> for each class [documents, heads, length, d]."""
    _, num_heads, num_tokens, head_dim = t.shape
    shapes = [(number, num_heads, length, head_dim) for length, number in classes.items()]
    if is_view:
        return (t.view(*shapes[0]),)

    waiting: list[Ghost] = []

    def run(gradient: Ghost) -> tuple[Ghost | None]:
        """One node going back: it waits for the gradients of all classes."""
        waiting.append(gradient)
        if len(waiting) < len(shapes):
            return (None,)
        together = _gathered(waiting, (1, num_heads, num_tokens, head_dim))
        waiting.clear()
        return (together,)

    return tuple(apply(t.ledger.tensor(shape, t.itemsize), (t,), (), run) for shape in shapes)


def _put_together(batches: Sequence[Ghost], shape: tuple[int, ...]) -> Ghost:
    """[documents * length, heads, d] of each class -> [T, heads, d]."""
    shapes = [batch.shape for batch in batches]

    def run(g: Ghost) -> tuple[Ghost, ...]:
        spread = g.ledger.tensor((sum(prod(s) for s in shapes),), g.itemsize)
        return tuple(Ghost(spread.storage, s, g.itemsize) for s in shapes)

    return apply(_gathered(batches, shape), batches, (), run)


def _gathered(batches: Sequence[Ghost], shape: tuple[int, ...]) -> Ghost:
    """Concatenated, then gathered."""
    ledger, itemsize = batches[0].ledger, batches[0].itemsize
    together = ledger.tensor((sum(batch.num_bytes for batch in batches),), 1)
    result = ledger.tensor(shape, itemsize)
    del together
    return result


def _causal(q: Ghost, k: Ghost, v: Ghost, rule: AttentionRule) -> Ghost:
    length, window = q.shape[2], rule.window
    if rule.blocked and length <= LONGEST and (window is None or length <= window):
        return _blocked(q, k, v)
    if window is None or length <= window:
        if not rule.has_softcap:
            return _sdpa(q, k, v, rule, mask=None)
        q.ledger.scratch(2 * length * length)
        mask = q.ledger.tensor((length, length), BOOL)
        return op.copied(_capped(q, k, v, mask))
    blocks, ledger = [], q.ledger
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        num_queries, num_keys = stop - start, stop - first
        distance = ledger.tensor((num_queries, num_keys), INT64)
        ledger.scratch(3 * num_queries * num_keys)
        mask = ledger.tensor((num_queries, num_keys), BOOL)
        q_part = _tokens(q, num_queries)
        k_part, v_part = _tokens(k, num_keys), _tokens(v, num_keys)
        if rule.has_softcap:
            blocks.append(_capped(q_part, k_part, v_part, mask))
        else:
            blocks.append(_sdpa(q_part, k_part, v_part, rule, mask))
        del distance, mask
    together = op.concatenate(blocks, dim=2)
    return op.copied(together) if rule.has_softcap else together


def _capped(q: Ghost, k: Ghost, v: Ghost, mask: Ghost) -> Ghost:
    """softmax(c tanh(s / c)) v with all scores of a block written out, several times."""
    num_heads, num_keys = q.shape[1], k.shape[2]
    k, v = op.written_out(k, num_heads), op.written_out(v, num_heads)
    if q.shape[0] > 1:
        q = op.copied(q)
    scores = op.scale(op.tanh(op.scale(op.scale(op.product(q, k, num_keys)))))
    scores = op.masked_fill(op.to(scores, FLOAT32), mask.like())
    return op.product(op.to(op.softmax(scores), q.itemsize), v, v.shape[3])


def _sdpa(q: Ghost, k: Ghost, v: Ghost, rule: AttentionRule, mask: Ghost | None) -> Ghost:
    """torch's kernel, which keeps the mask as numbers; on a GPU that of flash attention, or one that knows no
    shared key heads."""
    target = rule.target
    numbers = () if mask is None else (q.ledger.tensor(mask.shape, q.itemsize),)
    if not target.is_accelerator:
        return op.scaled_dot_product_attention(q, k, v, *numbers)
    is_flash = mask is None and target.flash_serves(q.itemsize, q.shape[3])
    if not is_flash and q.shape[1] != k.shape[1]:
        k, v = op.written_out(k, q.shape[1]), op.written_out(v, q.shape[1])
    scratch_bytes = sdpa_scratch_bytes(q, k, target, deterministic=rule.deterministic, is_flash=is_flash)
    return apply(*op.attention_node(q, k, v, *numbers), gradients_with_scratch(scratch_bytes))


def _tokens(t: Ghost, size: int) -> Ghost:
    """t[:, :, a:b]."""
    shape = t.shape
    view = Ghost(t.storage, (shape[0], shape[1], size, shape[3]), t.itemsize)
    return apply(view, (t,), (), lambda g: (g.ledger.tensor(shape, g.itemsize),))


def _blocked(q: Ghost, k: Ghost, v: Ghost) -> Ghost:
    """kernels/blocked_attention.py. Inputs are views with the heads in front: of several documents, flattened
    they are copies."""
    (number, num_heads, length, size), (_, num_keys, _, value_size) = q.shape, v.shape
    ledger, itemsize, batch = q.ledger, q.itemsize, number * num_keys
    group = num_heads // num_keys

    def flat(x: Ghost, width: int) -> Ghost:
        copied = number > 1
        return ledger.tensor((batch, length, width), itemsize) if copied else x

    def wide(x: Ghost) -> Ghost:
        return op.to(x, FLOAT32)

    def weights(block: Ghost, rows: int, stop: int) -> Ghost:
        block = wide(block)
        scores = ledger.tensor((batch, group * rows, stop), FLOAT32)
        del block
        ledger.scratch(rows * rows)
        return scores.like()

    def block_of(rows: int, width: int) -> Ghost:
        return ledger.tensor((batch, group * rows, width), itemsize)

    def forward() -> Ghost:
        out = ledger.tensor((number, num_heads, length, value_size), itemsize)
        keys, values = wide(flat(k.detach(), size)), flat(v.detach(), value_size)
        for rows, stop in _query_blocks(length):
            block = block_of(rows, size)
            probabilities = op.to(weights(block, rows, stop), itemsize)
            ledger.scratch(block_of(rows, value_size).num_bytes)
            del block, probabilities
        del keys, values
        return out

    def run(gradient: Ghost, q: Ghost, k: Ghost, v: Ghost) -> tuple[Ghost, Ghost, Ghost]:
        dq = q.like()
        keys, values = wide(flat(k, size)), wide(flat(v, value_size))
        dk, dv = (ledger.tensor((batch, length, width), FLOAT32) for width in (size, value_size))
        for rows, stop in _query_blocks(length):
            block, do = block_of(rows, size), block_of(rows, value_size)
            first = weights(block, rows, stop)
            rounded = op.to(first, itemsize)
            ledger.scratch(batch * stop * value_size * itemsize)
            del rounded
            wide_do = wide(do)
            second = first.like()
            del wide_do
            third = first.like()
            del first, second
            d_scores = op.to(third, itemsize)
            del third
            ledger.scratch(batch * (stop + group * rows) * size * itemsize)
            del block, do, d_scores
        results = op.to(dk, itemsize), op.to(dv, itemsize)
        del keys, values
        return dq, *results

    return apply(forward(), (q, k, v), (q, k, v), run)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """(rows, end) of each block of queries."""
    starts = range(0, length, BLOCK_QUERIES)
    return [(min(BLOCK_QUERIES, length - start), min(start + BLOCK_QUERIES, length)) for start in starts]
