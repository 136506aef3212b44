"""torch.distributed on the simulated device, one device per rank: gloo, on CPU tensors over the same bytes.

NCCL's part of a run is played by c10d's own operators for the CPU. accelerate knows the names of devices that
may have several processes; "sim" is told to it as CUDA is, for as long as a simulation is on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from simulated_gpu import install


@functools.cache
def _register() -> None:

    install.use_cpu_kernels_of("c10d")


def _gloo_for_several(
    self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
) -> tuple[str, Any]:
    """accelerate's `_prepare_backend` in a process that was launched as a rank."""
    from accelerate.utils import DistributedType

    return "gloo", DistributedType.MULTI_GPU


class _Barrier:
    """torch.distributed.barrier takes the devices of NCCL, of which gloo knows nothing."""

    def __init__(self, of_torch: Any) -> None:
        self._of_torch = of_torch

    def __call__(self, group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return self._of_torch(group, async_op)


@contextmanager
def ranks_on_device() -> Iterator[None]:
    """In a process of several, while a simulation is on."""
    from accelerate import PartialState

    _register()
    barrier, prepare = torch.distributed.barrier, PartialState._prepare_backend
    torch.distributed.barrier = _Barrier(barrier)  # type: ignore[assignment]
    PartialState._prepare_backend = _gloo_for_several
    try:
        yield
    finally:
        torch.distributed.barrier, PartialState._prepare_backend = barrier, prepare
