"""Flash attention over packed rows in one call: torch's own kernel for documents of any length.

`torch.nn.attention.varlen.varlen_attn` takes q, k, v as rows of tokens [T, heads, d] and the boundaries of
the documents, and computes per document what attention.py's per-document path computes: causal softmax with a
scale and, if there is one, a window. Nothing is padded or gathered, and one launch serves documents of all
lengths. Saved for backward: q, k, v, out and a log-sum-exp per query and head, fp32; no T x T scores exist in
either direction. Its backward adds up dq with atomics unless torch is told to be deterministic.

It is not for everyone: flash attention (arXiv:2307.08691) needs tensor cores of compute capability 8.0,
16-bit numbers and certain head sizes, and offers no tanh cap on scores (device/description.py says which
layers it serves). And the function grew between versions: without scale and window in torch 2.10, without a
word for grouped heads in 2.11, though the kernel below shares key heads there too, with `enable_gqa` from
2.12 on. So its parameters are looked at, not torch's version number, and what it can do is found out by doing
it: a few tokens forward and back, compared with plain torch (`try_varlen`).

Why not the flash-attn package: the same kernels, which would have to be compiled. Why not flex attention: it
is compiled per mask and shape, and the documents differ in every micro-batch.
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
"""Of float16 outputs and gradients around 1."""


@dataclass(frozen=True)
class VarlenAttention:
    """`function`, torch's `varlen_attn` or one that is called like it, on a device that has it."""

    function: Function
    device: DeviceDescription

    def serves(self, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
        """query, key, value: [1, heads, T, d]."""
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
        """query [1, Hq, T, d], key and value [1, Hkv, T, d] -> [1, T, Hq, d].

        cu_seqlens: int32 [num_documents + 1] on the device. longest: tokens of the longest document. window:
        how many tokens a query sees, itself included; None: all before it.
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
    """torch's function for a device on which it was found to work; None: documents are attended to one length
    class at a time."""
    return None if device.varlen == "none" else VarlenAttention(_torch_function(), device)


def try_varlen(where: torch.device, capability: Capability) -> Varlen:
    """What torch's function really does on this GPU, tried with equal heads and with grouped ones."""
    if capability < FLASH_CAPABILITY or not torch.backends.cuda.is_flash_attention_available():
        return "none"
    return what_works(_torch_function(), where, capability)


def what_works(function: Function, where: torch.device, capability: Capability) -> Varlen:
    """function: called like `varlen_attn`. Says with a warning what it does not do right."""
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
    """Why it cannot be used with two query heads; None: outputs and gradients are those of plain torch. For
    whoever looks at the device with gradients switched off too."""
    serving = DeviceDescription(where.type, capability, 0, "grouped heads", False, None, index=where.index)
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
    except Exception as error:  # what a version or a card lacks has no type of its own, and all of it is said
        return f"{type(error).__name__}: {error}".splitlines()[0]
    expected = _plain(inputs, 0.1, _TRIED_WINDOW)
    worst = max(float((f.cpu() - e).abs().amax()) for f, e in zip(found, expected, strict=True))
    return None if worst <= _TOLERANCE else f"its results are off by {worst:.2g}"


def _plain(inputs: list[Tensor], scaling: float, window: int) -> list[Tensor]:
    """The same with the scores of all tokens in fp32: [1, T, Hq, d] and the three gradients. On the CPU: at
    the first product of a process on a GPU torch decides for good whether cuBLAS is deterministic there
    (device/settings.py), and a look at the device is no time for that."""
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
