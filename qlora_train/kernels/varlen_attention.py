"""Flash attention over all documents of a packed row in one call, with torch's own varlen kernel.

`torch.nn.attention.varlen.varlen_attn` takes q, k, v as rows of tokens [T, heads, d] and the document
boundaries, and computes the same as the per-document path of model/attention.py: causal softmax with a scale
and optionally a window. Nothing is padded or gathered, and one launch handles documents of all lengths. Saved
for backward: q, k, v, out and a log-sum-exp in fp32 per query and head; no T x T scores are materialized. Its
backward sums dq with atomics unless torch is in deterministic mode.

Flash attention (arXiv:2307.08691) needs compute capability 8.0, 16-bit numbers and certain head sizes, and
has no tanh cap on scores (device/description.py says which layers are supported). The function differs
between versions: torch 2.10 has no scale and window, 2.11 no argument for grouped heads, although its kernel
shares key heads too, and 2.12 has `enable_gqa`. So the function's parameters decide, not torch's version, and
`try_varlen` tests it: forward and backward of a few tokens, compared with plain torch.

Why not the flash-attn package: it has the same kernels but must be compiled. Why not flex attention: it
compiles per mask and shape, and the documents differ in every micro-batch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_train.device.description import FLASH_CAPABILITY, Capability, DeviceDescription, Varlen

Function = Callable[..., Any]
_NEEDED = {"scale", "window_size"}
_TRIED_LENGTHS, _TRIED_WINDOW, _TRIED_HEAD_SIZE = (5, 1, 7), 3, 64
_TOLERANCE = 2e-2
"""Largest accepted absolute difference of float16 outputs and gradients around 1."""


@dataclass(frozen=True)
class VarlenAttention:
    """Attention over all documents in one call. function: `varlen_attn` or one like it."""

    function: Function
    device: DeviceDescription

    def serves(self, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
        """Whether the kernel supports these heads and dtype. query, key, value: [1, heads, T, d]."""
        size = query.shape[3]
        return size == value.shape[3] and self.device.varlen_serves(
            query.dtype.itemsize,
            size,
            grouped=query.shape[1] != key.shape[1],
            has_softcap=softcap is not None,
        )

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
        """Causal attention per document: query [1, Hq, T, d], key and value [1, Hkv, T, d] -> [1, T, Hq, d].

        cu_seqlens: int32 [num_documents + 1] on the device. longest: tokens of the longest document.
        scaling: None: d ** -0.5. window: tokens that a query sees, itself included; None: all up to itself.
        """
        rows = [t.squeeze(0).transpose(0, 1) for t in (query, key, value)]  # [T, heads, d]
        before = -1 if window is None or window >= longest else window - 1
        grouped = query.shape[1] != key.shape[1] and "enable_gqa" in _parameters(self.function)
        out: Tensor = self.function(
            *rows,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=scaling,
            window_size=(before, 0),
            **({"enable_gqa": True} if grouped else {}),
        )
        return out.unsqueeze(0)


def varlen_for(device: DeviceDescription) -> VarlenAttention | None:
    """Varlen attention for a device on which it works; None: use one call per length class."""
    return None if device.varlen == "none" else VarlenAttention(_torch_function(), device)


def try_varlen(where: torch.device, capability: Capability) -> Varlen:
    """Test torch's function on this GPU with equal and with grouped heads; returns what works."""
    if capability < FLASH_CAPABILITY or not torch.backends.cuda.is_flash_attention_available():
        return "none"
    return what_works(_torch_function(), where, capability)


def what_works(function: Function, where: torch.device, capability: Capability) -> Varlen:
    """Test `function`, with the signature of `varlen_attn`; returns what works and warns about the rest."""
    if not _parameters(function) >= _NEEDED:
        return "none"
    reason = _is_wrong(function, where, capability, num_key_heads=2)
    if reason is not None:
        _warn(f"is not used ({reason})")
        return "none"
    reason = _is_wrong(function, where, capability, num_key_heads=1)
    if reason is not None:
        _warn(f"is used only where every query head has a key head of its own ({reason})")
        return "equal heads"
    return "grouped heads"


@torch.inference_mode(False)
@torch.enable_grad()
def _is_wrong(
    function: Function, where: torch.device, capability: Capability, *, num_key_heads: int
) -> str | None:
    """The reason why `function` cannot be used with two query heads and `num_key_heads`, or None.

    Compares outputs and gradients with plain torch, also if the caller has switched gradients off."""
    serving = DeviceDescription(
        where.type,
        capability,
        num_multiprocessors=0,
        varlen="grouped heads",
        has_liger=False,
        cublas_workspace=None,
        index=where.index,
    )
    attention = VarlenAttention(function, serving)
    lengths = torch.tensor([0, *_TRIED_LENGTHS])
    boundaries = lengths.cumsum(0).to(torch.int32).to(where)
    shape = (1, 2, int(lengths.sum()), _TRIED_HEAD_SIZE)
    numbers = torch.sin(torch.arange(3 * shape[1] * shape[2] * shape[3], dtype=torch.float32) * 1.7)
    query, key, value = numbers.view(3, *shape).to(where, torch.float16)
    inputs = [t.clone().requires_grad_() for t in (query, key[:, :num_key_heads], value[:, :num_key_heads])]
    try:
        query, key, value = inputs
        out = attention.attend(query, key, value, boundaries, max(_TRIED_LENGTHS), 0.1, _TRIED_WINDOW)
        found = [out.detach(), *torch.autograd.grad(out, inputs, torch.cos(out.detach()))]
    except Exception as error:  # any type; all are reported
        return f"{type(error).__name__}: {error}".splitlines()[0]
    expected = _plain(inputs, 0.1, _TRIED_WINDOW)
    worst = max(float((f.cpu() - e).abs().amax()) for f, e in zip(found, expected, strict=True))
    return None if worst <= _TOLERANCE else f"its results are off by {worst:.2g}"


def _plain(inputs: list[Tensor], scaling: float, window: int) -> list[Tensor]:
    """Reference in plain torch with all scores, in fp32: outputs [1, T, Hq, d] and the three gradients.

    On the CPU, since the first product on a GPU fixes for the whole process whether cuBLAS is deterministic
    (device/settings.py), which is too early here."""
    query, key, value = (t.detach().cpu().float().requires_grad_() for t in inputs)
    document = torch.arange(len(_TRIED_LENGTHS)).repeat_interleave(torch.tensor(_TRIED_LENGTHS))
    at = torch.arange(len(document))
    distance = at[:, None] - at[None]
    seen = (document[:, None] == document[None]) & (distance >= 0) & (distance < window)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    out = (torch.softmax(scores, -1) @ value).transpose(1, 2)
    gradients = torch.autograd.grad(out, (query, key, value), torch.cos(out.detach()))
    return [out.detach(), *gradients]


def _warn(what: str) -> None:
    warnings.warn(
        f"torch {torch.__version__}'s attention over documents of any length {what}. Documents are attended "
        "to one length class at a time instead: slower where they are short, with the same results.",
        stacklevel=5,
    )


def _torch_function() -> Function:
    from torch.nn.attention.varlen import varlen_attn  # registers operators

    function: Function = varlen_attn
    return function


@cache
def _parameters(function: Function) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
