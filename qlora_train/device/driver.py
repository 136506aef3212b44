"""Queries to NVIDIA's driver without torch and without creating a context.

A context (a process's state on a card, created before its first kernel) takes hundreds of MiB of device
memory, so memory in use must be read before it exists. `nvidia-smi` comes with every driver; attributes come
from the driver's library, by the numbers in its header. Without an NVIDIA driver (ROCm, Intel, a CPU) every
result is empty, 0 or None.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from functools import cache
from typing import Any
from uuid import UUID

MIB = 2**20
VIRTUAL_MEMORY_MANAGEMENT = 102
"""CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: memory can be mapped after existing memory, as
expandable segments need; not on some virtual GPUs."""
MEMORY_BY_FILE_DESCRIPTOR = 103
"""CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: mapped memory can be shared with other
processes by file descriptor, as torch's allocator requires for all memory that it maps."""
CONCURRENT_MANAGED_ACCESS = 89
"""CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS: host and device may access managed memory at the same time,
and it migrates by page; not under Windows and WSL, nor on some virtual GPUs."""
_SMI_SECONDS = 5


def ask_nvidia_smi(*fields: str) -> list[list[str]]:
    """The fields of every GPU from nvidia-smi, one row per GPU, without units; empty if the tool is missing,
    fails or hangs."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return []
    rows = [[value.strip() for value in line.split(", ")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields)] if done.returncode == 0 else []


def memory_in_use() -> dict[str, int]:
    """Bytes in use by all processes on each GPU, by card UUID. A card that does not report it (e.g. a slice
    of a card) is omitted."""
    rows = ask_nvidia_smi("uuid", "memory.used")
    return {uuid.removeprefix("GPU-"): int(mib) * MIB for uuid, mib in rows if mib.isdigit()}


def num_cards() -> int:
    """Number of GPUs that CUDA sees; 0 without NVIDIA's driver."""
    driver, count = _driver(), ctypes.c_int(0)
    if driver is not None:
        driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def first_uuid() -> str | None:
    """UUID of the card that CUDA counts as 0 (CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER decide, which
    nvidia-smi does not read); None without one."""
    driver, found = _driver(), (ctypes.c_ubyte * 16)()
    if driver is None or driver.cuDeviceGetUuid(ctypes.byref(found), _handle(0)) != 0:
        return None
    return str(UUID(bytes=bytes(found)))


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that NVIDIA's driver supports; None without one."""
    driver, number = _driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def attribute(index: int, number: int) -> int | None:
    """Value of the CUdevice_attribute `number` of the card with CUDA index `index`; None if unknown."""
    driver, value = _driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetAttribute(ctypes.byref(value), number, _handle(index)) != 0:
        return None
    return value.value


def has_context() -> bool:
    """Whether this process already has a context on any card."""
    flags, is_active = ctypes.c_uint(), ctypes.c_int(0)
    for index in range(num_cards()):
        _driver().cuDevicePrimaryCtxGetState(_handle(index), ctypes.byref(flags), ctypes.byref(is_active))
        if is_active.value:
            return True
    return False


def _handle(index: int) -> ctypes.c_int:
    """The driver's handle (CUdevice) of a card."""
    device = ctypes.c_int()
    _driver().cuDeviceGet(ctypes.byref(device), index)
    return device


@cache
def _driver() -> Any:
    """The driver's library, initialized; None if it is missing or finds no card."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None
