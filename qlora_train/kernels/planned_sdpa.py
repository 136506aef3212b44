"""scaled_dot_product_attention in a plan: the kernel that the planned device would choose, and its scratch.

On the meta device torch would choose the math formula that materializes all scores. So the kernel is chosen
here, from the device's description; the operations (their results and saved tensors) are torch's.

Scratch inside an operation cannot be measured there, so it is computed from torch's source
(aten/src/ATen/native/transformers/cuda: flash_attn/flash_api.cpp, attention_backward.cu). It is allocated in
addition to dq, dk and dv. With N documents of n tokens (padded to one length, or T = sum of n in a row of
different lengths), H query heads of d numbers, d' = d rounded up to a multiple of 32 (of 64 above 128):

    flash, one call for a row     sums of dq  fp32 [T + 128 N, H, d'],  softmax_d  fp32 [H, T + 128 N]
    flash, padded documents       sums of dq  fp32 [N, n', H, d'],      softmax_d  fp32 [N, H, n'],
                                  n' = n rounded up to a multiple of 128
    both, with shared key heads   dk and dv of every query head, before they are summed
    one call, if not contiguous   a copy of the result, a copy of its gradient

In deterministic mode flash keeps ceil(multiprocessors / (N H)) sums of dq instead of adding to one with
atomics: many for one long document with few heads, one for many documents.

The memory-efficient kernel (capability below 8.0, float32, other head sizes, masks) sums dq, and for some
head sizes dk and dv, in fp32 if results have 16 bits: all three are counted, an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_train.device.description import DeviceDescription
from qlora_train.units import ceil_div, round_up

FLOAT32 = 4
TILE, EFFICIENT_TILE = 128, 64
_CPU_FLASH = 1  # of torch's SDPBackend


def planned_sdpa(
    card: DeviceDescription,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`scaled_dot_product_attention` for tensors on the meta device, as `card` would run it."""
    attend: Any = torch.ops.aten
    bias = _as_numbers(attn_mask, q)
    if card.is_accelerator:
        if bias is None and q.shape[3] == v.shape[3] and card.flash_serves(q.dtype.itemsize, q.shape[3]):
            return attend._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
        if enable_gqa:  # the kernel is unknown: assume repeated heads
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        saves = torch.is_grad_enabled() and q.requires_grad
        bias = None if bias is None else _padded(bias).expand(*q.shape[:2], *bias.shape[-2:])
        return attend._scaled_dot_product_efficient_attention(
            q, k, v, bias, saves, 0.0, is_causal, scale=scale
        )[0]
    sizes = tuple((t.shape[1], t.shape[3]) for t in (q, k, v))
    if _choice_on_cpu(sizes, q.dtype, attn_mask is not None, is_causal, enable_gqa) == _CPU_FLASH:
        return attend._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale
        )[0]
    return attend._scaled_dot_product_attention_math(
        q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _as_numbers(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask in q's dtype: 0 where True, -inf elsewhere."""
    return None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))


def _padded(bias: Tensor) -> Tensor:
    """The bias with rows aligned to 16 numbers, as the memory-efficient kernel needs."""
    num_keys = bias.shape[-1]
    return bias if num_keys % 16 == 0 else F.pad(bias, (0, -num_keys % 16))[..., :num_keys]


@cache
def _choice_on_cpu(
    sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, has_mask: bool, is_causal: bool, enable_gqa: bool
) -> int:
    """The SDPBackend that torch chooses on the CPU, for 16 tokens. sizes: (heads, head size) of q, k, v."""
    q, k, v = (torch.empty(1, heads, 16, size, dtype=dtype, requires_grad=True) for heads, size in sizes)
    mask = torch.ones(16, 16, dtype=torch.bool) if has_mask else None
    return int(torch._fused_sdp_choice(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=enable_gqa))


def flash_gap_bytes(num_heads: int, head_dim: int) -> int:
    """Bytes of the 128-token gap that flash leaves per document in one sum of dq and in softmax_d."""
    return TILE * num_heads * (_rounded_head(head_dim) + 1) * FLOAT32


def attention_scratch(
    card: DeviceDescription, *, deterministic: bool, most_documents: int
) -> dict[str, Callable[..., int]]:
    """Functions from an operation's arguments to its scratch in bytes, by operation name.

    most_documents: of any micro-batch; the scratch is the maximum over all numbers of documents from the
    planned micro-batch's up to this."""

    def num_sums(num_documents: int, num_heads: int) -> int:
        """Number of sums of dq kept at the same time."""
        return ceil_div(card.num_multiprocessors, num_documents * num_heads) if deterministic else 1

    def varlen(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any, **options: Any) -> int:
        num_tokens, num_heads = q.shape[:2]
        fewest = len(rest[1]) - 1  # from cu_seqlens
        most, enough = max(fewest, most_documents), ceil_div(card.num_multiprocessors, num_heads)
        copied = sum(t.nbytes for t in (grad, out) if not t.is_contiguous())
        return copied + max(
            _flash(q, k.shape[1], num_tokens + TILE * number, num_sums(number, num_heads), num_tokens)
            for number in _costliest(fewest, most, enough)
        )

    def flash(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
        number, num_heads, length = q.shape[:3]
        rows, num_tokens = number * round_up(length, TILE), number * k.shape[2]
        return _flash(q.transpose(1, 2), k.shape[1], rows, num_sums(number, num_heads), num_tokens)

    def efficient(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
        number, num_heads, length, head_dim = q.shape
        tokens = sum(round_up(n, EFFICIENT_TILE) for n in (length, k.shape[2], k.shape[2]))
        sums = number * num_heads * tokens * round_up(head_dim, EFFICIENT_TILE) * FLOAT32
        return number * num_heads * length * FLOAT32 + (sums if q.itemsize < FLOAT32 else 0)

    return {
        "torch_attn._varlen_attn_backward.default": varlen,
        "aten._scaled_dot_product_flash_attention_backward.default": flash,
        "aten._scaled_dot_product_efficient_attention_backward.default": efficient,
    }


def _flash(q: Tensor, num_key_heads: int, rows: int, num_sums: int, num_tokens: int) -> int:
    """Scratch bytes of flash's backward. q: [..., heads, d]. rows: of each sum, gaps included. num_tokens: of
    dk and dv."""
    num_heads = q.shape[-2]
    head_dim = q.shape[-1]
    sums = num_sums * rows * num_heads * _rounded_head(head_dim) * FLOAT32
    softmax_d = rows * num_heads * FLOAT32
    shares = num_heads != num_key_heads
    return sums + softmax_d + (2 * num_tokens * num_heads * head_dim * q.itemsize if shares else 0)


def _costliest(fewest: int, most: int, enough: int) -> Iterable[int]:
    """Candidate numbers of documents for the most scratch: fewer documents need more sums of dq; from
    `enough` on, where one sum suffices, more documents only add gaps."""
    return (*range(fewest, min(most, enough)), most)


def _rounded_head(head_dim: int) -> int:
    return round_up(head_dim, 32 if head_dim <= 128 else 64)
