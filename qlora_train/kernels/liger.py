"""liger-kernel's RMSNorm and SiLU-multiply kernels, for GPUs, if the extra `gpu` is installed.

The maths is in rms_norm.py and model/fused.py, whose plain torch is the reference. The kernels save memory
traffic: torch reads and writes a whole tensor per operation, these once per kernel. Bytes moved per element
in 16 bits (for the MLP per element of the intermediate width):

                          plain torch    liger
    RMSNorm forward            36           4      x in, y out
    RMSNorm backward           74           8      g and x in, dx out (filled with zeros first)
    SiLU-multiply forward      10           6      gate and up in, product out
    SiLU-multiply backward     28          16      the product again; then g, gate, up in, d_gate, d_up out

The kernels (Hsu et al. 2024, arXiv:2410.10989) sum a row in fp32 in a fixed order, without atomics: every run
gives the same bits. They round in other places than torch: results differ by up to 1e-5 of the largest value
in fp32, 2e-2 in 16 bits, as tests and `fuse_norms` check.

The functions below liger's own autograd.Functions are called, because ours save other tensors and skip the
gradient of RMSNorm's frozen weight: `needs_dw=False`, an argument that liger has since 0.8.5.

Not used: liger's rotary embedding, since each family's attention module calls the library's, and its RMSNorm
with residual add, which needs a rewritten decoder layer. Either would mean patching the library's classes.
The cost per token and layer is 16 bytes per element of q and k in forward and in backward, and 6 per element
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
    """liger's RMSNorm and SwiGLU. norms, swiglu: the modules liger_kernel.ops.rms_norm and .swiglu."""

    norms: ModuleType
    swiglu: ModuleType

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Any]:
        """x [..., D], weight [D] -> (y [..., D], r float32 [T], launch options), the last two for backward.

        r: 1 / root mean square of each row."""
        rounding = "gemma" if offset else "llama"
        y, _, scale, block_size, num_warps, mode = self.norms.rms_norm_forward(
            x.contiguous(), weight, eps, offset, rounding, None
        )
        return y, scale, (mode, block_size, num_warps)

    def rms_norm_backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, offset: float, launch: Any
    ) -> Tensor:
        """dL/dx [..., D] as a new tensor: `gradient` may be used elsewhere, e.g. by a residual sum after the
        norm (gemma2). scale: r. launch: from `rms_norm`."""
        rows = x.contiguous().view(-1, x.shape[-1])
        grad_input, _ = self.norms.rms_norm_backward(
            gradient.contiguous(), rows, weight, scale, offset, *launch, False, None, needs_dw=False
        )
        return grad_input

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up [T, I]; both contiguous, since the kernel has one stride for all tensors."""
        assert gate.is_contiguous() and up.is_contiguous()
        _, _, product = self.swiglu.swiglu_forward(gate, up)
        return product

    def silu_mul_backward_(self, gate: Tensor, up: Tensor, gradient: Tensor) -> None:
        """From gradient = dL/d product [T, I], write dL/d gate into `gate` and dL/d up into `up`.

        autograd raises an error if it has saved one of the overwritten tensors for another operation."""
        assert gate.is_contiguous() and up.is_contiguous() and gradient.is_contiguous()
        self.swiglu.swiglu_backward(gate, up, gradient)
        increment_version((gate, up))  # autograd does not see a Triton kernel's writes


class PlannedLiger(Liger):
    """`Liger` for a plan: allocates what liger-kernel's functions allocate, and computes nothing."""

    def __init__(self) -> None:
        """Needs no liger-kernel."""

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
    """liger-kernel for this device; None: use plain torch."""
    if not device.description.has_liger:
        return None
    return PlannedLiger() if device.is_planned else import_liger()


@cache
def import_liger() -> Liger | None:
    """liger-kernel, None if it is not installed; if it is installed but unusable: warns once, None."""
    return None if find_spec("liger_kernel") is None else usable_liger(import_module)


def usable_liger(load: Callable[[str], ModuleType]) -> Liger | None:
    """liger-kernel if its modules have what is needed; else warns with the reason and returns None.

    load: imports a module by name."""
    try:
        liger = Liger(load("liger_kernel.ops.rms_norm"), load("liger_kernel.ops.swiglu"))
    except ImportError as error:  # most likely built for another Triton
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
