"""Which kernels a model runs with: decided once, from the description of its device, the compute dtype and
`training.kernels`, and handed to its decoder. Nothing asks a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.liger import Liger, liger_for
from qlora_train.model.attention import AttentionKernels


@dataclass(frozen=True)
class KernelChoice:
    """attention: what attends to packed documents. liger: for norms and MLPs; None: plain torch.
    is_reference: library operations and autograd's own sums everywhere (`training.kernels: reference`)."""

    attention: AttentionKernels
    liger: Liger | None
    is_reference: bool = False

    @staticmethod
    def on(device: ComputeDevice, dtype: torch.dtype) -> KernelChoice:
        """The fastest there are."""
        return KernelChoice(AttentionKernels.on(device, dtype), liger_for(device))

    def reference(self) -> KernelChoice:
        """The reference of these."""
        return replace(self, attention=self.attention.plain(), liger=None, is_reference=True)
