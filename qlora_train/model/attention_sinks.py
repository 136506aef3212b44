"""Attention sinks (gpt_oss): a learned number per query head that takes part in the softmax and adds nothing,

    out = sum_j exp(s_j) v_j / (exp(sink) + sum_j exp(s_j)).

We put a virtual token in front of every document: its key scores `sink` with every query of the head, its
value is zero. So any fused causal kernel computes it, forward and backward, and key heads stay shared: the
number is put into the query, in columns where all other keys are zero,

    q' = [q, hi, lo, 0 ...]    k' = [k, 0, 0, ...]    virtual k' = [0, 1, 1, 0 ...]    hi + lo = sink / scale,

with hi rounded to 16 bits and lo the rest, for one 16-bit number does not hold it. Heads grow by 8 columns,
of which kernels want multiples.

Why not the sum of exponentials that kernels return: its gradient does not flow through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXTRA_COLUMNS = 8


def with_sink_columns(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, Hq, n, d], k and v [N, Hkv, m, d], sinks [Hq] -> the same with d + 8 columns."""
    exact = sinks.detach().float() / scale
    rounded = exact.to(q.dtype)
    columns = torch.zeros(len(sinks), EXTRA_COLUMNS, dtype=q.dtype, device=q.device)
    columns[:, 0], columns[:, 1] = rounded, (exact - rounded.float()).to(q.dtype)
    wide_q = torch.cat([q, columns[None, :, None].expand(*q.shape[:3], -1)], dim=3)
    wide_k, wide_v = (torch.cat([t, t.new_zeros(*t.shape[:3], EXTRA_COLUMNS)], dim=3) for t in (k, v))
    return wide_q, wide_k, wide_v


def with_sink_token(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v of `with_sink_columns` [N, Hkv, m, d + 8] with the token in front: [N, Hkv, m + 1, d + 8]."""
    front = k.new_zeros(*k.shape[:2], 1, k.shape[3])
    key = front.clone()
    key[..., -EXTRA_COLUMNS : 2 - EXTRA_COLUMNS] = 1
    return torch.cat([key, k], dim=2), torch.cat([front, v], dim=2)
