"""A GPU's operations on CPU tensors, as far as memory goes: they allocate what the real ones allocate, and
compute nothing.

Flash attention is written after torch's C++ (see ghost_flash.py), tensor for tensor. liger-kernel is the real
one, with its Triton kernels replaced by launches that do nothing: what it allocates is its own Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_train.kernels.liger import Liger, usable_liger
from qlora_train.model.fused import FusedNorm, _offset_of, _rms_norms


class NoKernel:
    """Can be launched on any grid."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


def idle_liger(monkeypatch: pytest.MonkeyPatch) -> Liger:
    """liger-kernel whose launches do nothing."""

    def load(name: str) -> ModuleType:
        module = import_module(name)
        for attribute in vars(module):
            if "_kernel" in attribute:
                monkeypatch.setattr(module, attribute, NoKernel())
        return module

    liger = usable_liger(load)
    assert liger is not None
    return liger


def put_in_norms(layers: list[nn.Module], liger: Liger) -> None:
    """As `fuse_norms` on a GPU, without a look at the results, of which there are none."""
    for layer in layers:
        for owner in list(layer.modules()):
            for name, norm in list(_rms_norms(owner)):
                offset = _offset_of(norm)
                if offset is not None:
                    setattr(owner, name, FusedNorm(norm, offset, liger))


def flash_like(num_multiprocessors: int, *, deterministic: bool) -> Callable[..., Tensor]:
    """Called like `varlen_attn`."""

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor) -> Tensor:
            out = torch.empty_like(query)
            log_sums = torch.empty(query.shape[1], query.shape[0])
            ctx.save_for_backward(query, key, value, boundaries, out, log_sums)
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            query, key, value, boundaries, out, _ = ctx.saved_tensors
            gradient, out = gradient.contiguous(), out.contiguous()
            total_q, num_heads, head_size = query.shape
            batch_size = len(boundaries) - 1
            multiple = 32 if head_size <= 128 else 64
            head_size_rounded = (head_size + multiple - 1) // multiple * multiple
            dq, dk, dv = (torch.empty_like(t) for t in (query, key, value))
            softmax_d = torch.empty(num_heads, total_q + 128 * batch_size)
            sums_shape = (total_q + 128 * batch_size, num_heads, head_size_rounded)
            if deterministic:
                per_split = batch_size * num_heads
                dq_accum = torch.empty((num_multiprocessors + per_split - 1) // per_split, *sums_shape)
            else:
                dq_accum = torch.empty(sums_shape)
            if key.shape[1] != num_heads:
                expanded = [query.new_empty(query.shape) for _ in range(2)]
                del expanded
            del softmax_d, dq_accum
            return dq, dk, dv, None

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        return Flash.apply(query, key, value, cu_seq_q)

    return attend


@contextmanager
def idle_flash_kernels() -> Iterator[None]:
    """Inside, torch's own `varlen_attn` runs on CPU tensors, above kernels that only return tensors."""

    def forward(query: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        nothing = query.new_empty(0)
        log_sums = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
        return torch.zeros_like(query), log_sums, torch.zeros(2, dtype=torch.uint64), nothing, nothing

    def backward(gradient: Tensor, *tensors: Any, **options: Any) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in tensors[:3])

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
