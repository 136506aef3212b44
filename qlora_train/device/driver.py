"""What only NVIDIA's driver tells of a card, asked without making a context: no torch, no memory taken.

A context (what a process needs on a card before its first kernel) takes hundreds of MiB, so what is in use
without it can be asked only before it is there. `nvidia-smi` comes with every driver; attributes come from
the driver's own library, by the numbers that its header has fixed. Where neither is (ROCm, Intel, a CPU)
every answer is "not known".
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from functools import cache
from typing import Any

MIB = 2**20
VIRTUAL_MEMORY_MANAGEMENT = 102
"""CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: memory can be mapped behind what there is, which
expandable segments do; some virtual GPUs cannot."""
MEMORY_BY_FILE_DESCRIPTOR = 103
"""CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: such memory can be handed to other
processes in this way, which torch's allocator asks of all that it maps."""
CONCURRENT_MANAGED_ACCESS = 89
"""CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS: host and device may touch managed memory at the same time,
and it moves page by page. Not so under Windows and WSL, and on some virtual GPUs."""
_SMI_SECONDS = 5


def ask_nvidia_smi(*fields: str) -> list[list[str]]:
    """A row for each GPU, without units; empty where the tool is missing, fails or hangs."""
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
    """Bytes in use on each GPU, by all processes, by the card's UUID. A card that does not say (a slice of
    one, for example) is left out."""
    rows = ask_nvidia_smi("uuid", "memory.used")
    return {uuid.removeprefix("GPU-"): int(mib) * MIB for uuid, mib in rows if mib.isdigit()}


def num_cards() -> int:
    """As many as CUDA numbers; 0 where there is no such driver."""
    driver, count = _driver(), ctypes.c_int(0)
    if driver is not None:
        driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def attribute(index: int, number: int) -> int | None:
    """A CUdevice_attribute of the card that CUDA numbers `index`; None where there is no such driver."""
    driver, value = _driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetAttribute(ctypes.byref(value), number, _handle(index)) != 0:
        return None
    return value.value


def has_context() -> bool:
    """Whether this process has a context on any card already."""
    flags, is_active = ctypes.c_uint(), ctypes.c_int(0)
    for index in range(num_cards()):
        _driver().cuDevicePrimaryCtxGetState(_handle(index), ctypes.byref(flags), ctypes.byref(is_active))
        if is_active.value:
            return True
    return False


def _handle(index: int) -> ctypes.c_int:
    """The driver's own number of a card."""
    device = ctypes.c_int()
    _driver().cuDeviceGet(ctypes.byref(device), index)
    return device


@cache
def _driver() -> Any:
    """The driver's library, ready to be asked; None where it is missing or finds no card."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None
