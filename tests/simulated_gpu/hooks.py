"""What `torch.accelerator` asks of the device: whether it is there."""

from __future__ import annotations

import sys
import warnings

from simulated_gpu import device_module, private_names
from simulated_gpu.simulation import DEVICE_TYPE, is_on


class _Hooks(private_names.Hooks):
    def is_available(self) -> bool:
        return is_on()

    def has_primary_context(self, device_index: int) -> bool:
        return is_on()

    def is_built(self) -> bool:
        return True


_HOOKS = _Hooks()
"""torch keeps a bare pointer to it."""


def register_device() -> None:
    """Names the device, makes `torch.sim`, and registers hooks and a device guard. Once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = sys.modules[device_module.__name__]
        private_names.set_up_backend(DEVICE_TYPE, backend_module=module, hook=_HOOKS)
