"""`torch.UntypedStorage(n, device="sim")`, as `copy.deepcopy` and `torch.load` make it, of device memory.

torch asks C++ for an allocator of the device, finds none and ends with a segmentation fault. So, as long as a
simulation is on, the class makes storages of the simulated device as `torch.empty` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from simulated_gpu import private_names
from simulated_gpu.simulation import DEVICE_TYPE, device_at, index_of


def _make(cls: type[torch.UntypedStorage], *arguments: Any, **keywords: Any) -> Any:
    device = keywords.get("device")
    if device is None or torch.device(device).type != DEVICE_TYPE:
        return private_names.make_storage(cls, *arguments, **keywords)
    (num_bytes,) = arguments or (0,)
    if not isinstance(num_bytes, int):
        raise NotImplementedError("a storage of the simulated GPU is made of a number of bytes alone")
    return device_at(index_of(device, optional=True)).empty((num_bytes,), (1,), torch.uint8).untyped_storage()


@contextmanager
def storages_of_device() -> Iterator[None]:
    """While a simulation is on."""
    torch.UntypedStorage.__new__ = _make  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del torch.UntypedStorage.__new__
