"""Which kernels a model runs with.

Decided once from the device's description, the compute dtype and `training.kernels`, then given to the
decoder: no kernel is chosen by looking at a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.liger import Liger, liger_for
from qlora_train.model.attention import AttentionKernels


@dataclass(frozen=True)
class KernelChoice:
    """The kernels of a model. attention: the kernels for packed documents. liger: those for norms and MLPs;
    None: plain torch. is_reference: library operations and autograd everywhere (`training.kernels:
    reference`)."""

    attention: AttentionKernels
    liger: Liger | None
    is_reference: bool = False

    @staticmethod
    def on(device: ComputeDevice, dtype: torch.dtype) -> KernelChoice:
        """The fastest kernels for this device and compute dtype."""
        return KernelChoice(AttentionKernels.on(device, dtype), liger_for(device))

    def reference(self) -> KernelChoice:
        """The reference kernels for the same device."""
        return replace(self, attention=self.attention.plain(), liger=None, is_reference=True)
