"""torch's scaled_dot_product_attention in a plan: the operation that the planned device would choose, and
what each attention kernel takes inside.

Asked on the meta device, torch takes the formula that writes all scores, which no device does. So the choice
is made here, by the description; the operations themselves (their results and what they save) are torch's.

Scratch inside an operation comes and goes with it and is seen by nobody, so it is stated, as written in
torch (aten/src/ATen/native/transformers/cuda: flash_attn/flash_api.cpp, attention_backward.cu). All of it
stands beside dq, dk and dv. With N documents of n tokens (padded to one length, or T = sum of n in a row of
different ones), H query heads of d numbers, d' = d rounded up to a multiple of 32 (of 64 above 128):

    flash, one call for a row     sums of dq  fp32 [T + 128 N, H, d'],  softmax_d  fp32 [H, T + 128 N]
    flash, padded documents       sums of dq  fp32 [N, n', H, d'],      softmax_d  fp32 [N, H, n'],
                                  n' = n rounded up to a multiple of 128
    both, if heads are shared     dk and dv written for every query head, before they are summed
    one call, if heads are outside of tokens in memory     a copy of the result and of its gradient

Told to be deterministic, flash keeps ceil(multiprocessors / (N H)) sums of dq side by side instead of adding
to one with atomics: many for one long document on a card with few heads to share out, one for many documents.

The memory-efficient kernel (capability below 8.0, float32, odd head sizes, masks) sums dq, and for some head
sizes dk and dv, in fp32 where results have 16 bits: all three are counted, which is the most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_train.device.description import DeviceDescription

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
    """Called like `scaled_dot_product_attention`, with tensors on the meta device. card: planned for."""
    attend: Any = torch.ops.aten
    bias = _as_numbers(attn_mask, q)
    if card.is_accelerator:
        if bias is None and q.shape[3] == v.shape[3] and card.flash_serves(q.dtype.itemsize, q.shape[3]):
            return attend._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
        if enable_gqa:  # a kernel that is not known may share them, or not
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
    """As kernels take it: 0 where attended to, -inf elsewhere."""
    return None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))


def _padded(bias: Tensor) -> Tensor:
    """With rows at multiples of 16 numbers, as the memory-efficient kernel reads them."""
    num_keys = bias.shape[-1]
    return bias if num_keys % 16 == 0 else F.pad(bias, (0, -num_keys % 16))[..., :num_keys]


@cache
def _choice_on_cpu(
    sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, has_mask: bool, is_causal: bool, enable_gqa: bool
) -> int:
    """torch's own choice, asked with a few tokens. sizes: (heads, numbers of each) of q, k and v."""
    q, k, v = (torch.empty(1, heads, 16, size, dtype=dtype, requires_grad=True) for heads, size in sizes)
    mask = torch.ones(16, 16, dtype=torch.bool) if has_mask else None
    return int(torch._fused_sdp_choice(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=enable_gqa))


def flash_gap_bytes(num_heads: int, head_dim: int) -> int:
    """Of a document's gap in one sum of dq and in softmax_d."""
    return TILE * num_heads * (_rounded_head(head_dim) + 1) * FLOAT32


def attention_scratch(
    card: DeviceDescription, *, deterministic: bool, most_documents: int
) -> dict[str, Callable[..., int]]:
    """Operation -> bytes that it takes inside, from its arguments. most_documents: that any micro-batch may
    have; where the one that is planned with has fewer, its row takes the most of any number between."""

    def num_sums(num_documents: int, num_heads: int) -> int:
        """Of dq, side by side."""
        return -(-card.num_multiprocessors // (num_documents * num_heads)) if deterministic else 1

    def varlen(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any, **options: Any) -> int:
        num_tokens, num_heads = q.shape[:2]
        fewest = len(rest[1]) - 1  # of the boundaries
        most, enough = max(fewest, most_documents), -(-card.num_multiprocessors // num_heads)
        copied = sum(t.nbytes for t in (grad, out) if not t.is_contiguous())
        return copied + max(
            _flash(q, k.shape[1], num_tokens + TILE * number, num_sums(number, num_heads), num_tokens)
            for number in _costliest(fewest, most, enough)
        )

    def flash(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
        number, num_heads, length = q.shape[:3]
        rows, num_tokens = number * _rounded(length, TILE), number * k.shape[2]
        return _flash(q.transpose(1, 2), k.shape[1], rows, num_sums(number, num_heads), num_tokens)

    def efficient(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
        number, num_heads, length, head_dim = q.shape
        tokens = sum(_rounded(n, EFFICIENT_TILE) for n in (length, k.shape[2], k.shape[2]))
        sums = number * num_heads * tokens * _rounded(head_dim, EFFICIENT_TILE) * FLOAT32
        return number * num_heads * length * FLOAT32 + (sums if q.itemsize < FLOAT32 else 0)

    return {
        "torch_attn._varlen_attn_backward.default": varlen,
        "aten._scaled_dot_product_flash_attention_backward.default": flash,
        "aten._scaled_dot_product_efficient_attention_backward.default": efficient,
    }


def _flash(q: Tensor, num_key_heads: int, rows: int, num_sums: int, num_tokens: int) -> int:
    """q: [..., heads, d]. rows: of the sums, with their gaps. num_tokens: of dk and dv."""
    num_heads = q.shape[-2]
    head_dim = q.shape[-1]
    sums = num_sums * rows * num_heads * _rounded_head(head_dim) * FLOAT32
    softmax_d = rows * num_heads * FLOAT32
    shares = num_heads != num_key_heads
    return sums + softmax_d + (2 * num_tokens * num_heads * head_dim * q.itemsize if shares else 0)


def _costliest(fewest: int, most: int, enough: int) -> Iterable[int]:
    """Numbers of documents of which one takes the most scratch: the fewer, the more sums of dq side by side;
    from where one is enough, more documents only add gaps."""
    return (*range(fewest, min(most, enough)), most)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _rounded_head(head_dim: int) -> int:
    return _rounded(head_dim, 32 if head_dim <= 128 else 64)
