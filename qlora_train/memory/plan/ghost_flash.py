"""Attention's kernels on a GPU with ghost tensors: what they save, and what they allocate for themselves.

As written in torch (aten/src/ATen/native/transformers/cuda: flash_attn/flash_api.cpp, attention_backward.cu).
Scratch exists inside one operation only, all of it beside dq, dk and dv. With N documents of n tokens (padded
to one length, or T = sum of n in a row of different ones), H query heads of d numbers, d' = d rounded up to a
multiple of 32 (of 64 above 128):

    flash, one call for a row     sums of dq  fp32 [T + 128 N, H, d'],  softmax_d  fp32 [H, T + 128 N]
    flash, padded documents       sums of dq  fp32 [N, n', H, d'],      softmax_d  fp32 [N, H, n'],
                                  n' = n rounded up to a multiple of 128
    both, if heads are shared     dk and dv written for every query head, before they are summed

Told to be deterministic, flash keeps ceil(multiprocessors / (N H)) sums of dq side by side instead of adding
to one with atomics: many for one long document on a card with few heads to share out, one for many documents.

The memory-efficient kernel (capability below 8.0, float32, odd head sizes, masks) sums dq, and for some head
sizes dk and dv, in fp32 where results have 16 bits: all three are counted, which is the most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qlora_train.device.description import DeviceDescription
from qlora_train.memory.plan.ghost import Ghost, apply
from qlora_train.memory.plan.ghost_ops import FLOAT32

TILE = 128
EFFICIENT_TILE = 64
SCRATCH = "attention's scratch"


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _rounded_head(head_dim: int) -> int:
    return _rounded(head_dim, 32 if head_dim <= 128 else 64)


def num_dq_sums(target: DeviceDescription, deterministic: bool, num_documents: int, num_heads: int) -> int:
    """Side by side in flash attention's backward pass."""
    return -(-target.num_multiprocessors // (num_documents * num_heads)) if deterministic else 1


def flash_gap_bytes(num_heads: int, head_dim: int) -> int:
    """Of a document's gap in one sum of dq and in softmax_d."""
    return TILE * num_heads * (_rounded_head(head_dim) + 1) * FLOAT32


def flash_scratch_bytes(
    rows: int,
    num_sums: int,
    num_heads: int,
    num_key_heads: int,
    num_tokens: int,
    head_dim: int,
    itemsize: int,
) -> int:
    """rows: of the sums, with their gaps. num_tokens: of dk and dv."""
    sums = num_sums * rows * num_heads * _rounded_head(head_dim) * FLOAT32
    softmax_d = rows * num_heads * FLOAT32
    expanded = 2 * num_tokens * num_heads * head_dim * itemsize if num_heads != num_key_heads else 0
    return sums + softmax_d + expanded


def varlen_attention(
    query: Ghost,
    key: Ghost,
    value: Ghost,
    fewest_documents: int,
    most_documents: int,
    target: DeviceDescription,
    *,
    deterministic: bool,
    heads_outside: bool,
) -> Ghost:
    """model/varlen_attention.py, one call for the row: [1, heads, T, d] -> [1, T, heads * d]. Nothing is
    gathered. Saved: q, k, v, the result and a log-sum-exp per query and head. fewest_documents,
    most_documents: in a row; the scratch is the largest that any number between takes. heads_outside: in q's
    memory, and so in the result's: it is copied for the linear behind it, and once more going back."""
    rows = [_tokens_first(t) for t in (query, key, value)]
    num_tokens, num_heads, head_dim = rows[0].shape
    result = rows[0].like()
    log_sums = result.ledger.tensor((num_heads, num_tokens), FLOAT32)
    scratch_bytes = max(
        flash_scratch_bytes(
            num_tokens + TILE * num_documents,
            num_dq_sums(target, deterministic, num_documents, num_heads),
            num_heads,
            rows[1].shape[1],
            num_tokens,
            head_dim,
            result.itemsize,
        )
        for num_documents in _costliest(fewest_documents, most_documents, target, num_heads)
    )
    if heads_outside:
        scratch_bytes += result.num_bytes
    out = apply(result, rows, (*rows, result, log_sums), gradients_with_scratch(scratch_bytes))
    if heads_outside:
        out = apply(result.like(), (out,), (), lambda g: (g,))
    return out.view(1, num_tokens, num_heads * head_dim)


def _costliest(fewest: int, most: int, target: DeviceDescription, num_heads: int) -> Iterable[int]:
    """Numbers of documents of which one takes the most scratch: the fewer, the more sums of dq side by side;
    from where one is enough, more documents only add gaps."""
    enough = -(-target.num_multiprocessors // num_heads)
    return (*range(fewest, min(most, enough)), most)


def _tokens_first(t: Ghost) -> Ghost:
    """t.squeeze(0).transpose(0, 1)."""
    _, num_heads, num_tokens, head_dim = t.shape
    return t.view(num_tokens, num_heads, head_dim)


def sdpa_scratch_bytes(
    q: Ghost, k: Ghost, target: DeviceDescription, *, deterministic: bool, is_flash: bool
) -> int:
    """Of torch's SDPA going back, for padded documents [N, heads, n, d]."""
    number, num_heads, length, head_dim = q.shape
    if is_flash:
        return flash_scratch_bytes(
            number * _rounded(length, TILE),
            num_dq_sums(target, deterministic, number, num_heads),
            num_heads,
            k.shape[1],
            number * k.shape[2],
            head_dim,
            q.itemsize,
        )
    tokens = sum(_rounded(n, EFFICIENT_TILE) for n in (length, k.shape[2], k.shape[2]))
    sums = number * num_heads * tokens * _rounded(head_dim, EFFICIENT_TILE) * FLOAT32
    return number * num_heads * length * FLOAT32 + (sums if q.itemsize < FLOAT32 else 0)


def gradients_with_scratch(scratch_bytes: int) -> Callable[..., tuple[Ghost, ...]]:
    """The backward of an attention kernel that saved q, k, v first."""

    def run(g: Ghost, *saved: Ghost) -> tuple[Ghost, ...]:
        gradients = tuple(x.like() for x in saved[:3])
        with g.ledger.cause(SCRATCH):
            g.ledger.scratch(scratch_bytes)
        return gradients

    return run
