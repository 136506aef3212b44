"""Flash attention of variable length, as `torch.nn.attention.varlen` calls it: aten::_flash_attention_*.

Documents lie one after the other, `cu_seqlens` [num_documents + 1] says where each begins. Each is attended
to by the CPU's fused kernel for one document; empty ones, which programs pad the list with, are skipped.
Refused is what the CUDA kernels refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simulated_gpu import private_names
from simulated_gpu.attention import FLASH_CAPABILITY, HALF_DTYPES
from simulated_gpu.memory import CPU
from simulated_gpu.operators import call_on_cpu
from simulated_gpu.simulation import DEVICE_TYPE, running

MAX_HEAD_SIZE = 256


class _Document(NamedTuple):
    queries: slice
    keys: slice
    mask: Tensor | None
    """Additive [1, 1, n, m]; None where `is_causal` says all."""
    is_causal: bool


class _Window(NamedTuple):
    """How many keys a query sees to its left and right, itself not counted; below 0: all."""

    left: int
    right: int

    def mask(self, num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
        """Queries are the last of the keys, as flash aligns them."""
        own = torch.arange(num_queries, device=CPU)[:, None] + num_keys - num_queries
        key = torch.arange(num_keys, device=CPU)[None]
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=CPU)
        if self.left >= 0:
            seen &= key >= own - self.left
        if self.right >= 0:
            seen &= key <= own + self.right
        return torch.where(seen, 0.0, float("-inf")).to(dtype)[None, None]


def _documents(
    cu_queries: Tensor, cu_keys: Tensor, window: _Window, dtype: torch.dtype
) -> Iterator[_Document]:
    starts, key_starts = cu_queries.tolist(), cu_keys.tolist()
    for a, b, c, d in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        if a == b or c == d:
            continue
        sees_all_left = window.left < 0 or window.left >= d - c - 1
        aligned = b - a == d - c
        if sees_all_left and (window.right < 0 or window.right >= d - c - 1):
            yield _Document(slice(a, b), slice(c, d), None, False)
        elif sees_all_left and window.right == 0 and aligned:
            yield _Document(slice(a, b), slice(c, d), None, True)
        else:
            yield _Document(slice(a, b), slice(c, d), window.mask(b - a, d - c, dtype), False)


def _of_document(tensor: Tensor, part: slice) -> Tensor:
    """[tokens, heads, d] -> [1, heads, n, d]."""
    return tensor[part].transpose(0, 1).unsqueeze(0)


def forward_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    window: _Window,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """query: [T, Hq, d], key and value: [S, Hkv, d] -> [T, Hq, d], logsumexp [Hq, T]."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    logsumexp = torch.full((query.shape[1], query.shape[0]), float("inf"), dtype=torch.float32, device=CPU)
    for document in _documents(cu_queries, cu_keys, window, query.dtype):
        part, part_logsumexp = private_names.cpu_flash(
            _of_document(query, document.queries),
            _of_document(key, document.keys),
            _of_document(value, document.keys),
            0.0,
            document.is_causal,
            attn_mask=document.mask,
            scale=scale,
        )
        out[document.queries] = part[0].transpose(0, 1)
        logsumexp[:, document.queries] = part_logsumexp.reshape(query.shape[1], -1)
    return out, logsumexp


def backward_on_cpu(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    window: _Window,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    gradients = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    for document in _documents(cu_queries, cu_keys, window, query.dtype):
        places = (document.queries, document.keys, document.keys)
        parts = private_names.cpu_flash_backward(
            _of_document(gradient, document.queries),
            _of_document(query, document.queries),
            _of_document(key, document.keys),
            _of_document(value, document.keys),
            _of_document(out, document.queries),
            logsumexp[:, document.queries][None].contiguous(),
            0.0,
            document.is_causal,
            attn_mask=document.mask,
            scale=scale,
        )
        for whole, part, place in zip(gradients, parts, places, strict=True):
            whole[place] = part[0].transpose(0, 1)
    return gradients[0], gradients[1], gradients[2]


def _refuse_what_flash_refuses(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raises the RuntimeErrors of aten/native/transformers/cuda/flash_attn/flash_api.cpp."""
    size = query.shape[-1]
    if running().settings.capability < FLASH_CAPABILITY:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    if query.dtype not in HALF_DTYPES or not query.dtype == key.dtype == value.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if size % 8 != 0 or size > MAX_HEAD_SIZE:
        raise RuntimeError(f"FlashAttention: head_size should be a multiple of 8, at most 256, not {size}")
    if query.shape[1] % key.shape[1] != 0:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if cu_seqlens is None or cu_seqlens.dtype != torch.int32 or cu_seqlens.device.type != DEVICE_TYPE:
        raise RuntimeError("cu_seqlens must be int32 tensors on the device")


class _Forward:
    """What runs on the CPU in place of the CUDA kernel, which also returns the state of its random
    numbers."""

    def __init__(self, window: _Window, scale: float | None) -> None:
        self._window, self._scale = window, scale

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_queries: Tensor,
        cu_keys: Tensor,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, ...]:
        out, logsumexp = forward_on_cpu(query, key, value, cu_queries, cu_keys, self._window, self._scale)
        state = torch.zeros(2, dtype=torch.uint64, device=CPU)
        unused = torch.zeros(0, dtype=torch.uint64, device=CPU)
        return out, logsumexp, state, unused, torch.zeros(0, dtype=query.dtype, device=CPU)


class _Backward:
    def __init__(self, window: _Window, scale: float | None) -> None:
        self._window, self._scale = window, scale

    def __call__(self, *arguments: Any, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        gradient, query, key, value, out, logsumexp, cu_queries, cu_keys = arguments[:8]
        documents = (cu_queries, cu_keys, self._window, self._scale)
        return backward_on_cpu(gradient, query, key, value, out, logsumexp, *documents)


def _window(is_causal: bool, left: int | None, right: int | None) -> _Window:
    right = 0 if is_causal else right
    return _Window(-1 if left is None else left, -1 if right is None else right)


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **rest: Any,
) -> Any:
    """aten::_flash_attention_forward"""
    _refuse_what_flash_refuses(query, key, value, cum_seq_q)
    _only_training(dropout_p, rest)
    run = _Forward(_window(is_causal, window_size_left, window_size_right), scale)
    arguments = (
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
    )
    return call_on_cpu(private_names.flash_forward, *arguments, run=run)


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> Any:
    """aten::_flash_attention_backward"""
    _refuse_what_flash_refuses(query, key, value, cum_seq_q)
    run = _Backward(_window(is_causal, window_size_left, window_size_right), scale)
    tensors = (grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k)
    numbers = (max_q, max_k, dropout_p, is_causal, rng_state, unused)
    return call_on_cpu(private_names.flash_backward, *tensors, *numbers, run=run)


def _only_training(dropout_p: float, rest: dict[str, Any]) -> None:
    given = [name for name, value in rest.items() if value is not None]
    if dropout_p or given:
        raise NotImplementedError(f"simulated flash attention knows no {', no '.join(['dropout', *given])}")
