"""Flash attention over packed rows in one call: torch's own kernel for documents of any length.

`torch.nn.attention.varlen.varlen_attn` takes q, k, v as rows of tokens [T, heads, d] and the boundaries of
the documents, and computes per document what attention.py's per-document path computes: causal softmax with a
scale and, if there is one, a window. Nothing is padded or gathered, and one launch serves documents of all
lengths. Saved for backward: q, k, v, out and a log-sum-exp per query and head, fp32; no T x T scores exist in
either direction. Its backward adds up dq with atomics unless torch is told to be deterministic.

It is not for everyone: flash attention (arXiv:2307.08691) needs tensor cores of compute capability 8.0,
16-bit numbers and certain head sizes, and offers no tanh cap on scores. What it serves is decided here by
pure functions of what the hardware, the family and this version of torch are; everything else takes the
per-document path. The function grew between versions: without scale and window in torch 2.10, without grouped
heads in 2.11, with all three from 2.12 on, so its parameters are looked at, not torch's version number.

Why not the flash-attn package: the same kernels, which would have to be compiled. Why not flex attention: it
is compiled per mask and shape, and the documents differ in every micro-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Capability = tuple[int, int]
FLASH_CAPABILITY = (8, 0)
FLASH_DTYPES = (torch.float16, torch.bfloat16)


class Heads(NamedTuple):
    """How many query and key heads, and how long their vectors are; those of values may be others."""

    num_query: int
    num_key: int
    size: int
    value_size: int

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor) -> Heads:
        """query, key, value: [N, heads, n, d]."""
        return Heads(query.shape[1], key.shape[1], query.shape[3], value.shape[3])


@cache
def flash_serves(capability: Capability, dtype: torch.dtype, heads: Heads) -> bool:
    """Whether torch's flash kernels, forward and backward, run for these heads without a cap on scores."""
    # 193 to 224 lacks a backward on capabilities 8.6, 8.9 and 12.0: too little shared memory.
    has_size = heads.size % 8 == 0 and (heads.size <= 192 or 224 < heads.size <= 256)
    return (
        capability >= FLASH_CAPABILITY
        and dtype in FLASH_DTYPES
        and has_size
        and heads.size == heads.value_size
    )


@cache
def attention_kernel(
    capability: Capability,
    dtype: torch.dtype,
    heads: Heads,
    has_softcap: bool,
    parameters: frozenset[str],
) -> Literal["varlen", "documents"]:
    """Which path attends to packed documents on a GPU of this capability.

    parameters: names that this torch's `varlen_attn` takes.
    """
    expressible = {"scale", "window_size"} <= parameters and (
        heads.num_query == heads.num_key or "enable_gqa" in parameters
    )
    if expressible and not has_softcap and flash_serves(capability, dtype, heads):
        return "varlen"
    return "documents"


@dataclass(frozen=True)
class VarlenAttention:
    """`function`, torch's `varlen_attn` or one that is called like it, on a GPU of `capability`."""

    function: Callable[..., Any]
    capability: Capability

    def can_say(self, *parameters: str) -> bool:
        """Whether the function takes all of them."""
        return _parameters(self.function).issuperset(parameters)

    def serves(self, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
        """query, key, value: [1, heads, T, d]. Decided once for each kind of layer."""
        heads, parameters = Heads.of(query, key, value), _parameters(self.function)
        kernel = attention_kernel(self.capability, query.dtype, heads, softcap is not None, parameters)
        return kernel == "varlen"

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """query [1, Hq, T, d], key and value [1, Hkv, T, d] -> [1, T, Hq, d].

        cu_seqlens: int32 [num_documents + 1] on the device. longest: tokens of the longest document. window:
        how many tokens a query sees, itself included; None: all before it.
        """
        rows = [t.squeeze(0).transpose(0, 1) for t in (query, key, value)]  # [T, heads, d]
        before = -1 if window is None or window >= longest else window - 1
        grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        out: Tensor = self.function(
            *rows,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=scaling,
            window_size=(before, 0),
            **grouped,
        )
        return out.unsqueeze(0)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def varlen_attention(device: torch.device) -> VarlenAttention | None:
    """What torch offers on this device; None without a GPU, or where torch was built without flash
    attention."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return None
    from torch.nn.attention.varlen import varlen_attn

    return VarlenAttention(varlen_attn, torch.cuda.get_device_capability(device))
