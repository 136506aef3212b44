"""Causal attention on a CPU in blocks of queries, as matrix products.

    S = s q k^T     P = softmax(S + causal)     o = P v          per block of queries, keys up to its end
    dv = P^T do     dS = P (do v^T - rowsum(P do v^T))           dq = s dS k     dk = s dS^T q

torch's fused CPU kernel runs every head of a document in one thread, which multiplies small tiles; for
documents of a few dozen to a few hundred tokens its backward takes several times as long as the products
need. Here all heads and documents are one batched product. Query heads that share a key head are rows of it,
so grouped keys are never repeated, and a block of `BLOCK_QUERIES` keeps the scores in the cache. Documents
longer than `LONGEST` tokens gain nothing.

Scores, softmax and its backward are in fp32 for every input dtype; P and dS are rounded to the inputs' dtype
before the products that follow, as in flash attention (arXiv:2205.14135). Saved for backward: q, k, v; the P
of a block is recomputed. Working memory: three fp32 blocks of scores, 12 bytes times heads, `BLOCK_QUERIES`
and the number of keys.

On a GPU flash attention is faster (kernels/varlen_attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_QUERIES = 64
LONGEST = 512
"""Tokens of the longest document for which this is faster than torch's kernel."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of N documents of n tokens, in blocks of queries.

    query [N, Hq, n, d], key [N, Hkv, n, d], value [N, Hkv, n, e], Hkv a divisor of Hq -> [N, Hq, n, e]."""
    return _CausalAttention.apply(query, key, value, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        num_documents, num_heads, length, _ = query.shape
        out = value.new_empty(num_documents, length, num_heads, value.shape[3]).transpose(1, 2)
        keys, values = key.flatten(0, 1).float(), value.flatten(0, 1)
        for rows in _blocks(query.shape[2]):
            block = _grouped(query, key, rows)
            weights = _weights(block, keys[:, : rows.stop], rows, scale).to(value.dtype)
            out[:, :, rows] = torch.bmm(weights, values[:, : rows.stop]).view(out[:, :, rows].shape)
            del block, weights
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        scale, dtype = ctx.scale, query.dtype
        dq = torch.empty_like(query)  # keeps the strides, tokens before heads
        keys, values = key.flatten(0, 1).float(), value.flatten(0, 1).float()
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        for rows in _blocks(query.shape[2]):
            block, do = _grouped(query, key, rows), _grouped(gradient, key, rows)
            weights = _weights(block, keys[:, : rows.stop], rows, scale)
            dv[:, : rows.stop] += torch.bmm(weights.to(dtype).transpose(1, 2), do)
            d_weights = torch.bmm(do.float(), values[:, : rows.stop].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, torch.float32)
            del weights, d_weights
            d_scores = d_scores.mul_(scale).to(dtype)
            dq[:, :, rows] = torch.bmm(d_scores, keys[:, : rows.stop].to(dtype)).view(dq[:, :, rows].shape)
            dk[:, : rows.stop] += torch.bmm(d_scores.transpose(1, 2), block)
            del block, do, d_scores
        return dq, dk.to(dtype).view(key.shape), dv.to(dtype).view(value.shape), None


def _blocks(num_queries: int) -> Iterator[slice]:
    for start in range(0, num_queries, BLOCK_QUERIES):
        yield slice(start, min(start + BLOCK_QUERIES, num_queries))


def _grouped(x: Tensor, key: Tensor, rows: slice) -> Tensor:
    """The tokens `rows` of x [N, Hq, n, d] as [N Hkv, G rows, d], the G heads of a key head in sequence."""
    return x[:, :, rows].reshape(key.shape[0] * key.shape[1], -1, x.shape[3])


def _weights(block: Tensor, keys: Tensor, rows: slice, scale: float) -> Tensor:
    """P of one block of queries [N Hkv, G rows, d] for keys [N Hkv, rows.stop, d]: fp32 [N Hkv, G rows,
    rows.stop]."""
    scores = torch.bmm(block.float(), keys.transpose(1, 2)).mul_(scale)
    num_rows = rows.stop - rows.start
    later = torch.ones(num_rows, num_rows, dtype=torch.bool, device=block.device).triu_(1)
    on_diagonal = scores.view(scores.shape[0], -1, num_rows, rows.stop)[..., rows.start :]
    on_diagonal.masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1)
