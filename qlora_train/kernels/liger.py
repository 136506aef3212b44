"""liger-kernel's elementwise kernels, on a GPU where the extra `gpu` is installed; plain torch otherwise.

What they compute is in rms_norm.py and model/fused.py, whose plain torch is the reference. What they save is
passes over memory: torch reads and writes a whole tensor per operation, these once per kernel. Bytes moved
per element in 16 bits (for the MLP per element of the intermediate width):

                          plain torch    liger
    RMSNorm forward            36           4      x in, y out
    RMSNorm backward           74           8      g and x in, dx out (filled with zeros first)
    SiLU-multiply forward      10           6      gate and up in, product out
    SiLU-multiply backward     28          16      the product again; then g, gate, up in, d_gate, d_up out

The kernels (Hsu et al. 2024, arXiv:2410.10989) sum a row in fp32 in a fixed order, without atomics: the same
bits in every run. They round at other places than torch does: within 1e-5 of the largest value in fp32, 2e-2
in 16 bits, which tests and `fuse_norms` check.

The functions underneath liger's own autograd.Functions are used, because ours save and skip other things:
RMSNorm's weight is frozen, and liger's gradient of it (no pass of its own over the tokens: sums in registers,
one row per multiprocessor, and a reduction of those) is left out with `needs_dw`; it is new in liger 0.8.5.

Not used: liger's rotary embedding, because the library's is called inside each family's attention module, and
its RMSNorm with residual add, which needs a decoder layer written anew. Either would mean patching the
library's classes. Per token and layer that leaves 16 bytes per element of q and k each way, and 6 per element
of the one norm inside a layer that follows a residual sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qlora_train.device.compute import ComputeDevice


@dataclass(frozen=True)
class Liger:
    """The modules liger_kernel.ops.rms_norm and liger_kernel.ops.swiglu, with our conventions around them."""

    norms: ModuleType
    swiglu: ModuleType

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Any]:
        """x [..., D], weight [D] -> y [..., D], r float32 [T], and how the kernel was launched: both for
        backward."""
        rounding = "gemma" if offset else "llama"
        y, _, scale, block_size, num_warps, mode = self.norms.rms_norm_forward(
            x.contiguous(), weight, eps, offset, rounding, None
        )
        return y, scale, (mode, block_size, num_warps)

    def rms_norm_backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, offset: float, launch: Any
    ) -> Tensor:
        """dL/dx [..., D]. Not in place of the gradient: with a residual sum behind the norm (gemma2) that is
        somebody else's too."""
        rows = x.contiguous().view(-1, x.shape[-1])
        grad_input, _ = self.norms.rms_norm_backward(
            gradient.contiguous(), rows, weight, scale, offset, *launch, False, None, needs_dw=False
        )
        return grad_input

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, all [T, I], contiguous: the kernels know one stride for all."""
        assert gate.is_contiguous() and up.is_contiguous()
        _, _, product = self.swiglu.swiglu_forward(gate, up)
        return product

    def silu_mul_backward_(self, gate: Tensor, up: Tensor, gradient: Tensor) -> None:
        """From gradient = dL/d product: dL/d gate into `gate`, dL/d up into `up`. Their values are gone then:
        should autograd have saved them, it says so when they are asked for again."""
        assert gate.is_contiguous() and up.is_contiguous() and gradient.is_contiguous()
        self.swiglu.swiglu_backward(gate, up, gradient)
        increment_version((gate, up))  # a Triton kernel writes behind autograd's back


class PlannedLiger(Liger):
    """Takes the memory that liger-kernel's functions take, and computes nothing: for a plan."""

    def __init__(self) -> None:
        """Needs no module."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Any]:
        x = x.contiguous()
        return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32), None

    def rms_norm_backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, offset: float, launch: Any
    ) -> Tensor:
        _rows, gradient = x.contiguous(), gradient.contiguous()
        return torch.empty_like(gradient)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.empty_like(gate)

    def silu_mul_backward_(self, gate: Tensor, up: Tensor, gradient: Tensor) -> None: ...


def liger_for(device: ComputeDevice) -> Liger | None:
    """liger-kernel for tensors of this device; None: plain torch."""
    if not device.description.has_liger:
        return None
    return PlannedLiger() if device.is_planned else import_liger()


@cache
def import_liger() -> Liger | None:
    """liger-kernel where it is installed and can be used; warns, once, where it is installed and cannot."""
    return None if find_spec("liger_kernel") is None else usable_liger(import_module)


def usable_liger(load: Callable[[str], ModuleType]) -> Liger | None:
    """load: a module by name. Warns with the reason where it is None."""
    try:
        liger = Liger(load("liger_kernel.ops.rms_norm"), load("liger_kernel.ops.swiglu"))
    except ImportError as error:  # made for another Triton, most likely
        _warn(f"it cannot be imported ({error})")
        return None
    if "needs_dw" not in signature(liger.norms.rms_norm_backward).parameters:
        _warn("it is older than 0.8.5")
        return None
    return liger


def _warn(reason: str) -> None:
    warnings.warn(
        f"liger-kernel is installed but not used: {reason}. Plain torch takes its place: slower, with the "
        "same results up to rounding. `pip install --upgrade 'qlora-train[gpu]'` brings one that fits.",
        stacklevel=4,
    )
