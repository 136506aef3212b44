"""`scaled_dot_product_attention` as a GPU chooses it: fused where a kernel of CUDA would be.

torch decides by the device in C++, where Python cannot register: on an unknown one it always writes all
scores. Here the choice is CUDA's (aten/native/transformers/cuda/sdp_utils.cpp, in short), so that a path that
CUDA does not fuse takes the memory that it would take there. What computes is the CPU's fused kernel, with
the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simulated_gpu import private_names
from simulated_gpu.memory import alias
from simulated_gpu.simulation import running

FLASH_CAPABILITY = (8, 0)
HALF_DTYPES = (torch.float16, torch.bfloat16)
_CPU_FUSED = 1
"""torch.nn.attention.SDPBackend.FLASH_ATTENTION as a number."""


def cuda_would_fuse(
    capability: tuple[int, int], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> bool:
    """Whether flash or memory-efficient attention serves. query, key, value: [N, heads, n, d]."""
    dtype, size = query.dtype, query.shape[-1]
    same_size = size == key.shape[-1] == value.shape[-1]
    has_bfloat16 = capability >= FLASH_CAPABILITY
    flash = has_bfloat16 and dtype in HALF_DTYPES and mask is None and same_size and size <= 256
    shares_heads = query.shape[1] != key.shape[1]
    alignment = 1 if dtype == torch.float32 else 8
    efficient = (
        (dtype in (torch.float32, torch.float16) or (dtype == torch.bfloat16 and has_bfloat16))
        and not shares_heads
        and size % alignment == 0
        and value.shape[-1] % alignment == 0
    )
    return flash or efficient


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """aten::scaled_dot_product_attention"""
    fused = query.dim() == 4 and cuda_would_fuse(running().settings.capability, query, key, value, attn_mask)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        open_ = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = open_.masked_fill_(~attn_mask, float("-inf"))
    if fused and _cpu_can_fuse(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        return private_names.cpu_flash(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    return private_names.attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _cpu_can_fuse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> bool:
    with torch.no_grad(), private_names.no_modes():
        parts = [alias(t.detach()).requires_grad_(t.requires_grad) for t in (query, key, value)]
        mask = None if mask is None else alias(mask.detach())
        choice: int = private_names.fused_choice(
            *parts, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return choice == _CPU_FUSED
