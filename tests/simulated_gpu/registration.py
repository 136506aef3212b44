"""Tells torch that a device "sim" exists, once per process: before the first backward pass of the process,
because autograd's engine counts devices then and never again.

That is all that CPU tests of the same process get of it: `torch.sim.is_available()` and
`torch.accelerator.is_available()` are False until a simulation is on. It takes a few milliseconds; kernels
are registered when the device is switched on first (install.py).
"""

from __future__ import annotations

import sys
import warnings

import torch

from simulated_gpu import device_module, private_names
from simulated_gpu.simulation import DEVICE_TYPE, is_on


class _Hooks(private_names.Hooks):
    """What torch.accelerator asks."""

    def is_available(self) -> bool:
        return is_on()

    def has_primary_context(self, device_index: int) -> bool:
        return is_on()

    def is_built(self) -> bool:
        return True


_HOOKS = _Hooks()


def obstacle() -> str | None:
    """Why there can be no simulated GPU in this process."""
    if torch.cuda.is_available():
        return "a real GPU is here: the simulated one would take its place in torch.accelerator"
    return None


def register() -> None:
    """Once: later calls do nothing. Nothing either where there is an obstacle."""
    if hasattr(torch, DEVICE_TYPE) or obstacle() is not None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private_names.set_up_backend(
            DEVICE_TYPE, backend_module=sys.modules[device_module.__name__], hook=_HOOKS
        )
