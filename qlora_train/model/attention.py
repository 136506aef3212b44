"""Attention over packed rows: no token sees another document, and no dense T x T mask exists.

A micro-batch is one flat row of T tokens with document boundaries. With q, k, v of shape [1, heads, T, d] the
result for document [s, e) is  softmax(scaling * q[s:e] k[s:e]^T + causal) v[s:e],  nothing else.

On GPUs where flash attention supports a layer, one call computes all documents
(kernels/varlen_attention.py). This module has the path for everything else: other layers and GPUs, every CPU,
and reference mode, against which the flash path is tested.

How: documents of one length class are gathered into a right-padded batch [num_documents, heads, length, d]
and passed to torch's SDPA with `is_causal=True`. Right padding needs no mask: a padded key comes after every
real query, and outputs of padded queries are dropped. That is one call per class instead of one per document,
with attention memory linear in T (flash and memory-efficient kernels; torch chooses). A length class is the
length rounded up to a multiple of 16, or of a quarter of the power of two below it: at most 4 classes per
octave and 25 % padding from 64 tokens on. A document's padded length depends on its own length alone, so its
rounding errors do not depend on how the data is split into micro-batches.

A sliding window w only matters for documents longer than w: those run in blocks of w queries against at most
2w - 1 visible keys. Saved for backward: what SDPA saves (q, k, v, out, log-sum-exp).

Of torch's GPU kernels only flash can share a key head among query heads. Where it does not run (capability
below 8.0, float32, a mask), key heads are repeated for every query head and the memory-efficient kernel runs;
with `enable_gqa`, torch would choose the math kernel, which materializes all scores.

Why not transformers' own packed masks: they build [1, 1, T, T], quadratic in T. Why not the flash-attn
package: it needs a compiler and a GPU of compute capability 8.0; this module runs anywhere.

The function is registered under `NAME` in transformers' attention interface (no patching). An argument that
it does not know is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.description import CPU, NO_CAPABILITY, DeviceDescription
from qlora_train.errors import UnsupportedModelError
from qlora_train.kernels.blocked_attention import LONGEST, causal_attention
from qlora_train.kernels.document_gather import gather_documents, scatter_documents
from qlora_train.kernels.planned_sdpa import planned_sdpa
from qlora_train.kernels.varlen_attention import VarlenAttention, varlen_for
from qlora_train.model.attention_sinks import with_sink_columns, with_sink_token

NAME = "qlora_train_packed"

# Passed by some families, without effect here: `documents` and `kv_lengths` determine positions and masks.
_INERT_ARGUMENTS = {"position_ids", "use_cache", "output_attentions", "cache_position", "is_causal"}


@dataclass(frozen=True)
class AttentionKernels:
    """The attention kernels for packed documents on one device. varlen: computes all documents in one call,
    for the layers that it supports; None: not available. blocks_documents: short documents go through
    kernels/blocked_attention.py. sdpa: torch's function, or its replacement in a plan
    (kernels/planned_sdpa.py)."""

    device: DeviceDescription
    varlen: VarlenAttention | None
    blocks_documents: bool
    sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention

    @staticmethod
    def on(device: ComputeDevice, dtype: torch.dtype) -> AttentionKernels:
        """The fastest attention kernels for this device and compute dtype."""
        card = device.description
        blocks_documents = card.blocks_documents and dtype != torch.float16  # slow on a CPU
        sdpa = partial(planned_sdpa, card) if device.is_planned else F.scaled_dot_product_attention
        return AttentionKernels(card, varlen_for(card), blocks_documents, sdpa)

    def plain(self) -> AttentionKernels:
        """The same device with SDPA for everything: the reference."""
        return replace(self, varlen=None, blocks_documents=False)

    def sdpa_shares_heads(self, q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
        """Whether SDPA can share key heads among query heads without materializing all scores; of CUDA's
        kernels only flash can."""
        if self.device.capability == NO_CAPABILITY:
            return True
        has_one_size = q.shape[3] == v.shape[3]
        return mask is None and has_one_size and self.device.flash_serves(q.dtype.itemsize, q.shape[3])


PLAIN = AttentionKernels(CPU, None, blocks_documents=False)


@dataclass(frozen=True)
class DocumentLayout:
    """The positions of the documents in a packed row, built once per micro-batch and shared by all layers.

    boundaries: host integers 0 = b0 < b1 < ... = T; document i is [b_i, b_i+1).
    buckets: one index tensor [num_documents, length] per length class, right-padded with a valid position.
    inverse: [T], where each token of the row stands in the concatenation of the flattened buckets.
    cu_seqlens: int32 [num_documents + 1], the boundaries on the device. longest: tokens of the longest
    document. expert_counts: rows of every expert by the experts' name, as the layers' last forward pass had
    them (frozen_experts.py).
    """

    boundaries: tuple[int, ...]
    buckets: tuple[Tensor, ...]
    inverse: Tensor
    cu_seqlens: Tensor
    longest: int
    expert_counts: dict[str, list[int]] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(boundaries: np.ndarray, device: torch.device | str) -> DocumentLayout:
        """Build the layout from `cu_seqlens` (integers [num_documents + 1])."""
        bounds = np.asarray(boundaries, dtype=np.int64)
        starts, lengths = bounds[:-1], np.diff(bounds)
        assert bounds[0] == 0 and (lengths > 0).all(), "document boundaries must start at 0 and increase"
        padded_lengths = _padded_length(lengths)
        inverse = np.empty(bounds[-1], dtype=np.int64)
        buckets, base = [], 0
        for padded in np.unique(padded_lengths):
            members = np.flatnonzero(padded_lengths == padded)
            offsets = np.minimum(np.arange(padded)[None], lengths[members, None] - 1)
            indices = starts[members, None] + offsets
            real = np.arange(padded)[None] < lengths[members, None]
            places = base + np.arange(indices.size).reshape(indices.shape)
            inverse[indices[real]] = places[real]
            buckets.append(torch.from_numpy(indices).to(device))
            base += indices.size
        return DocumentLayout(
            tuple(int(b) for b in bounds),
            tuple(buckets),
            torch.from_numpy(inverse).to(device),
            torch.from_numpy(bounds.astype(np.int32)).to(device),
            int(lengths.max()),
        )

    def moved(self, move: Callable[[Tensor], Tensor]) -> DocumentLayout:
        """A copy with every tensor replaced by move(tensor)."""
        return DocumentLayout(
            self.boundaries,
            tuple(move(bucket) for bucket in self.buckets),
            move(self.inverse),
            move(self.cu_seqlens),
            self.longest,
        )


def _padded_length(lengths: np.ndarray) -> np.ndarray:
    """Lengths rounded up to multiples of a quarter of the power of two below, and of at least 16."""
    unit = np.maximum(16, 2 ** np.floor(np.log2(lengths)).astype(np.int64) // 4)
    return -(-lengths // unit) * unit


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: DocumentLayout | None = None,
    kv_lengths: Tensor | None = None,
    attention_kernels: AttentionKernels = PLAIN,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over packed documents or a key-value cache, in transformers' calling convention.

    Training, evaluation and prefill: `documents` given, q [1, Hq, T, d], k and v [1, Hkv, T, d]. Decoding:
    `kv_lengths` [B] given, q [B, Hq, 1, d], k and v [B, Hkv, capacity, d], the first kv_lengths[b] of them
    real. s_aux: sinks [Hq] (attention_sinks.py). Returns ([B, T, Hq, d], None). Raises
    `UnsupportedModelError` for arguments it does not know.
    """
    unknown = {name for name, v in kwargs.items() if v is not None} - _INERT_ARGUMENTS
    if unknown or attention_mask is not None or dropout:
        refused = sorted(unknown) or (
            ["attention_mask"] if attention_mask is not None else ["attention dropout"]
        )
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(refused)} to attention, which packing cannot honour"
        )
    if (documents is None) == (kv_lengths is None):
        raise UnsupportedModelError(
            f"{type(module).__name__} does not hand the document boundaries on to its attention function: "
            "packed documents would see each other"
        )
    rule = _ScoreRule(scaling, sliding_window, softcap, s_aux)
    kernels, varlen = attention_kernels, attention_kernels.varlen
    if kv_lengths is not None:
        return _decode(query, key, value, kv_lengths, rule, kernels).transpose(1, 2).contiguous(), None
    assert documents is not None
    if varlen is not None and s_aux is None and varlen.serves(query, key, value, softcap):
        boundaries, longest = documents.cu_seqlens, documents.longest
        return varlen.attend(query, key, value, boundaries, longest, scaling, sliding_window), None
    return _by_document(query, key, value, documents, rule, kernels), None


AttentionInterface.register(NAME, packed_attention)


@dataclass(frozen=True)
class _ScoreRule:
    """What a family does to the scores: their scale, how far back a query sees, tanh capping, sinks."""

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None = None


def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: DocumentLayout,
    rule: _ScoreRule,
    kernels: AttentionKernels,
) -> Tensor:
    indices, places = documents.buckets, documents.inverse
    parts = [gather_documents(t.squeeze(0).transpose(0, 1), indices, places) for t in (query, key, value)]
    outputs = []
    for q, k, v in zip(*parts, strict=True):  # [documents, length, heads, d]
        attended = _causal(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rule, kernels)
        outputs.append(attended.transpose(1, 2))
    del parts
    return scatter_documents(outputs, indices, places).unsqueeze(0)


def _causal(q: Tensor, k: Tensor, v: Tensor, rule: _ScoreRule, kernels: AttentionKernels) -> Tensor:
    """Causal attention of a right-padded batch of documents; q [N, Hq, n, d] -> [N, Hq, n, d]."""
    length = q.shape[2]
    if rule.sinks is not None:
        return _causal_with_sinks(q, k, v, rule, kernels)
    if rule.window is None or length <= rule.window:
        if rule.softcap is None and kernels.blocks_documents and length <= LONGEST:
            return causal_attention(q, k, v, q.shape[3] ** -0.5 if rule.scaling is None else rule.scaling)
        if rule.softcap is None:
            return _sdpa(q, k, v, rule, kernels, mask=None, is_causal=True)
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        return _capped(q, k, v, rule, kernels, mask)
    attend = _sdpa if rule.softcap is None else _capped
    blocks = [
        attend(q[:, :, rows], k[:, :, columns], v[:, :, columns], rule, kernels, mask)
        for rows, columns, mask in _window_blocks(length, rule.window, q.device)
    ]
    return torch.cat(blocks, dim=2)


def _window_blocks(length: int, window: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries, the keys that any of them sees, and which of them does."""
    for start in range(0, length, window):
        rows = slice(start, min(start + window, length))
        columns = slice(max(0, start - window + 1), rows.stop)
        places = torch.arange(rows.stop, device=device)
        distance = places[rows][:, None] - places[columns]
        yield rows, columns, (distance >= 0) & (distance < window)


def _causal_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, rule: _ScoreRule, kernels: AttentionKernels
) -> Tensor:
    """`_causal` of heads with sinks, one more key in front of each document."""
    assert rule.sinks is not None
    if rule.softcap is not None:
        raise UnsupportedModelError("attention with sinks and capped scores")
    sinks, (length, width), scale = rule.sinks, q.shape[2:], rule.scaling or q.shape[3] ** -0.5
    rule = replace(rule, scaling=scale)
    q, k, v = with_sink_columns(q, k, v, sinks, scale)
    if rule.window is None or length <= rule.window:
        front = q.new_zeros(*q.shape[:2], 1, q.shape[3])  # keeps queries and keys on one diagonal
        keys, values = with_sink_token(k, v)
        y = _sdpa(torch.cat([front, q], dim=2), keys, values, rule, kernels, mask=None, is_causal=True)
        return y[:, :, 1:, :width]
    blocks = []
    for rows, columns, mask in _window_blocks(length, rule.window, q.device):
        keys, values = with_sink_token(k[:, :, columns], v[:, :, columns])
        seen = F.pad(mask, (1, 0), value=True)
        blocks.append(_sdpa(q[:, :, rows], keys, values, rule, kernels, seen)[..., :width])
    return torch.cat(blocks, dim=2)


def _decode(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor, rule: _ScoreRule, kernels: AttentionKernels
) -> Tensor:
    distance = kv_lengths[:, None] - 1 - torch.arange(k.shape[2], device=q.device)  # [B, capacity]
    mask = distance >= 0
    if rule.window is not None:
        mask &= distance < rule.window
    attend = _sdpa if rule.softcap is None else _capped
    if rule.sinks is None:
        return attend(q, k, v, rule, kernels, mask[:, None, None, :])
    width, scale = q.shape[3], rule.scaling or q.shape[3] ** -0.5
    q, k, v = with_sink_columns(q, k, v, rule.sinks, scale)
    keys, values = with_sink_token(k, v)
    seen = F.pad(mask, (1, 0), value=True)[:, None, None, :]
    return _sdpa(q, keys, values, replace(rule, scaling=scale), kernels, seen)[..., :width]


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: _ScoreRule,
    kernels: AttentionKernels,
    mask: Tensor | None,
    is_causal: bool = False,
) -> Tensor:
    shares_heads = q.shape[1] != k.shape[1]
    if shares_heads and not kernels.sdpa_shares_heads(q, v, mask):
        k, v = _written_out(q, k, v)
        shares_heads = False
    return kernels.sdpa(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=rule.scaling, enable_gqa=shares_heads
    )


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value heads repeated, one for every query head."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, rule: _ScoreRule, kernels: AttentionKernels, mask: Tensor
) -> Tensor:
    """softmax(c tanh(s / c)) v: no fused kernel has it, so the scores of one block are materialized."""
    assert rule.softcap is not None
    k, v = _written_out(q, k, v)
    scale = rule.scaling if rule.scaling is not None else q.shape[-1] ** -0.5
    scores = rule.softcap * torch.tanh((q @ k.transpose(2, 3)) * scale / rule.softcap)
    scores = scores.float().masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1).to(q.dtype) @ v
