"""Which device is here, and which of the kernels run on it: asked once at the start of a command, and handed
down from then on.

Triton is launched, liger-kernel imported, flash attention over documents tried on a few tokens against plain
torch: there is no list of what may be missing, so what counts is whether it works. What does not is said with
a warning, and slower operations with the same results take its place.
"""

from __future__ import annotations

import torch

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.description import DeviceDescription, cublas_workspace
from qlora_train.kernels.liger import import_liger
from qlora_train.kernels.triton_support import triton_runs
from qlora_train.kernels.varlen_attention import try_varlen


def find_device(where: torch.device | None = None) -> ComputeDevice:
    """The device to compute on, described. where: as accelerate gives it, possibly without an index, which is
    then the current one; None: the accelerator that torch finds, else the CPU."""
    if where is None:
        where = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if where.type == "cpu":
        return THE_CPU
    index = where.index if where.index is not None else torch.get_device_module(where).current_device()
    return _described(torch.device(where.type, index))


def _described(where: torch.device) -> ComputeDevice:
    module = torch.get_device_module(where)
    properties = module.get_device_properties(where)
    capability = (getattr(properties, "major", 0), getattr(properties, "minor", 0))
    has_triton = triton_runs(where)
    return ComputeDevice(
        DeviceDescription(
            type=where.type,
            capability=capability,
            num_multiprocessors=getattr(properties, "multi_processor_count", 0),
            varlen=try_varlen(where, capability),
            has_liger=has_triton and import_liger() is not None,
            cublas_workspace=cublas_workspace(),
            has_triton=has_triton,
            has_bfloat16=module.is_bf16_supported(including_emulation=False),
            index=where.index,
            name=module.get_device_name(where),
            memory_bytes=properties.total_memory,
        )
    )
