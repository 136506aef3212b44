"""Detection of the compute device and of the kernels that run on it, once at the start of a command.

What may be missing cannot be listed, so each kernel is tried: Triton is launched, liger-kernel imported,
flash attention over documents compared with plain torch on a few tokens. For each that fails a warning is
given, and slower operations with the same results are used.
"""

from __future__ import annotations

import torch

from qlora_train.device import driver
from qlora_train.device.compute import ComputeDevice, find_accelerator
from qlora_train.device.description import CPU, DeviceDescription, cublas_workspace
from qlora_train.device.settings import segments_expand
from qlora_train.kernels.liger import import_liger
from qlora_train.kernels.triton_support import triton_runs
from qlora_train.kernels.varlen_attention import try_varlen


def find_device(where: torch.device | None = None) -> ComputeDevice:
    """The device to compute on. where: as accelerate gives it; without an index the current one of its type.
    None: the accelerator of `find_accelerator`, else the CPU."""
    if where is None:
        where = find_accelerator() or torch.device("cpu")
    if where.type == "cpu":
        return ComputeDevice(CPU)
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
            has_expandable_segments=_is_nvidia(where) and segments_expand(),
            has_concurrent_managed_access=managed_access_is_concurrent(where),
        )
    )


def managed_access_is_concurrent(where: torch.device) -> bool:
    """Whether host and device may access managed memory at the same time, as NVIDIA's driver says; False for
    other devices."""
    return _is_nvidia(where) and bool(driver.attribute(where.index, driver.CONCURRENT_MANAGED_ACCESS))


def _is_nvidia(where: torch.device) -> bool:
    """Whether the device is NVIDIA's; ROCm's devices have the type "cuda" too."""
    return where.type == "cuda" and torch.version.hip is None
