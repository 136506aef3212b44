"""What this machine really does per second: products, device memory, copies to and from the host.

The planner's seconds are bytes and FLOPs over rates, so a plan is as good as its rates. A few products and
copies, timed once, take a second or two; the result is kept in the cache folder under the device's name, the
dtype and torch's version. The disk is not timed: what it gives depends on what the system has cached; a
stated rate stands for it. What another time may be faster is not kept: copies that the system refused to pin,
products that had to be small because the device was nearly full. Where it is full, nothing is timed, and the
stated rates stand.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.description import DeviceDescription
from qlora_train.memory.host_memory import HostMemory
from qlora_train.memory.plan.time_model import Rates, stated_rates

_FILE = "rates.json"
_COPY_BYTES = 2**26
_LARGEST_MATRIX, _CPU_MATRIX, _ROWS_PER_MULTIPROCESSOR = 8192, 2048, 128
_SHARE_OF_FREE = 0.25
_LEAST_FREE_BYTES = 2**28  # torch's allocator takes 20 MiB for what is above one
_REPEATS = 5


def rates_of(device: ComputeDevice, dtype: torch.dtype, cache: Path, num_ranks: int = 1) -> Rates:
    """Measured now, or by an earlier run on this machine. cache: folder that remembers. num_ranks: that
    measure at the same time. Leaves nothing on the device."""
    name = device.description.name or platform.processor() or "cpu"
    key = f"{name}, {torch.get_num_threads()} threads, {dtype}, torch {torch.__version__}"
    if num_ranks > 1:
        key += f", {num_ranks} at a time"
    known = _read(cache / _FILE)
    if key not in known:
        free_bytes = device.free_bytes
        if free_bytes < _LEAST_FREE_BYTES:
            return stated_rates(device.description)
        host = HostMemory(device)
        size = matrix_size(device.description, free_bytes, dtype)
        buffer = host.empty(min(_COPY_BYTES, int(free_bytes * _SHARE_OF_FREE / 2)))
        rates = _measure(device, dtype, size, buffer)
        device.release_cached()  # what products and copies took would stay beside other sizes
        if host.num_unpinned_bytes or size < _wanted_size(device.description):
            return rates
        known[key] = asdict(rates)
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"{_FILE}.partial-{os.getpid()}"  # others may be reading
        partial.write_text(json.dumps(known, indent=1) + "\n")
        partial.replace(cache / _FILE)
    return Rates(**known[key])  # type: ignore[arg-type]  # what asdict wrote


def _read(file: Path) -> dict[str, dict[str, float | str]]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not there, or damaged: measured again
        return {}


def copy_rate(device: ComputeDevice, host: Tensor) -> float:
    """Bytes per second between a buffer (uint8) in host memory and the device, the slower way."""
    here = torch.empty_like(host, device=device.torch)
    in_seconds = fastest_seconds(device, lambda: here.copy_(host, non_blocking=True))
    out_seconds = fastest_seconds(device, lambda: host.copy_(here, non_blocking=True))
    return host.numel() / max(in_seconds, out_seconds)


def matrix_size(device: DeviceDescription, free_bytes: int, dtype: torch.dtype) -> int:
    """Rows and columns of the products that are timed: three matrices in a quarter of what is free, so that a
    card that is nearly full can be measured."""
    most = int(math.sqrt(free_bytes * _SHARE_OF_FREE / (3 * dtype.itemsize))) // 64 * 64
    return min(_wanted_size(device), max(64, most))


def _wanted_size(device: DeviceDescription) -> int:
    """Enough for every multiprocessor to have several tiles."""
    if not device.is_accelerator:
        return _CPU_MATRIX
    return max(64, min(_LARGEST_MATRIX, _ROWS_PER_MULTIPROCESSOR * device.num_multiprocessors) // 64 * 64)


def _measure(device: ComputeDevice, dtype: torch.dtype, size: int, host: Tensor) -> Rates:
    """size: rows and columns of the products. host: uint8, what is copied."""
    num_bytes = host.numel()
    a, b = (torch.randn(size, size, dtype=dtype, device=device.torch) for _ in range(2))
    product_seconds = fastest_seconds(device, partial(torch.matmul, a, b.t()))
    del a, b
    copy = copy_rate(device, host)
    here = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch)
    there = torch.empty_like(here)
    memory_seconds = fastest_seconds(device, lambda: there.copy_(here))
    return Rates(
        flops=2 * size**3 / product_seconds,
        memory=2 * num_bytes / memory_seconds,
        copy=copy,
        disk=stated_rates(device.description).disk,
        source=f"measured here (products of {size} x {size} in {dtype}); disk as stated",
    )


def fastest_seconds(device: ComputeDevice, run: Callable[[], object]) -> float:
    """Of a few runs after one that warms up."""
    times = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        run()
        device.wait()
        times.append(time.perf_counter() - started)
    return min(times[1:])
