"""What this machine really does per second: products, device memory, copies to and from the host.

The planner's seconds are bytes and FLOPs over rates, so a plan is as good as its rates. A few products and
copies, timed once, take a second or two; the result is kept in the cache folder under the device's name, the
dtype and torch's version. The disk is not timed: what it gives depends on what the system has cached; a
stated rate stands for it. Copies that the system refused to pin are timed too, but not kept: it may allow it
the next time.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from qlora_train.memory.host_memory import HostMemory
from qlora_train.memory.plan.time_model import Rates, stated_rates

_FILE = "rates.json"
_MATRIX = {"cuda": 8192, "cpu": 2048}
_COPY_BYTES = {"cuda": 2**28, "cpu": 2**26}
_REPEATS = 5


def rates_of(device: torch.device, dtype: torch.dtype, cache: Path) -> Rates:
    """Measured now, or by an earlier run on this machine. cache: folder that remembers."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    key = f"{name}, {torch.get_num_threads()} threads, {dtype}, torch {torch.__version__}"
    known = _read(cache / _FILE)
    if key not in known:
        host = HostMemory(device)
        rates = _measure(device, dtype, host.empty(_COPY_BYTES[device.type]))
        if not host.pinned:
            return rates
        known[key] = asdict(rates)
        cache.mkdir(parents=True, exist_ok=True)
        (cache / _FILE).write_text(json.dumps(known, indent=1) + "\n")
    return Rates(**known[key])  # type: ignore[arg-type]  # what asdict wrote


def _read(file: Path) -> dict[str, dict[str, float | str]]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not there, or damaged: measured again
        return {}


def copy_rate(device: torch.device, host: Tensor) -> float:
    """Bytes per second between a buffer (uint8) in host memory and the device, the slower way."""
    here = torch.empty_like(host, device=device)
    in_seconds = _seconds(device, lambda: here.copy_(host, non_blocking=True))
    out_seconds = _seconds(device, lambda: host.copy_(here, non_blocking=True))
    return host.numel() / max(in_seconds, out_seconds)


def _measure(device: torch.device, dtype: torch.dtype, host: Tensor) -> Rates:
    """host: uint8, what is copied."""
    size, num_bytes = _MATRIX[device.type], host.numel()
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_seconds = _seconds(device, lambda: a @ b.t())
    copy = copy_rate(device, host)
    here = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    memory_seconds = _seconds(device, lambda: there.copy_(here))
    return Rates(
        flops=2 * size**3 / product_seconds,
        memory=2 * num_bytes / memory_seconds,
        copy=copy,
        disk=stated_rates("cuda" if device.type == "cuda" else "cpu", None).disk,
        source=f"measured here (products of {size} x {size} in {dtype}); disk as stated",
    )


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    """The fastest of a few runs after one that warms up."""
    times = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
