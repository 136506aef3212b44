"""Measures this machine's rates per second: products, attention, device memory, copies to and from the host.

The planner's seconds are bytes and FLOPs divided by rates. Timing products and copies takes a second or two;
the result is kept in the cache folder under the device's name, the dtype and torch's version. The disk
is not timed, as that depends on what the system has cached; its stated rate is used. Results that may be
better later are not kept: copies from memory that the system refused to pin, products that had to be
small because the device was nearly full. What a CPU did while other programs used it is kept apart, until it
is measured without them. On a full device nothing is timed and stated rates are used.
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_train import __version__
from qlora_train.device.compute import ComputeDevice
from qlora_train.device.description import DeviceDescription
from qlora_train.files.atomic_file import replace_text
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.model.attention import AttentionKernels, DocumentLayout, packed_attention
from qlora_train.plan.plan_cache import RATES_FILE as FILE
from qlora_train.plan.time_model import Rates, stated_rates
from qlora_train.weights.host_memory import HostMemory

_COPY_BYTES = 2**26
_LARGEST_MATRIX, _CPU_MATRIX, _ROWS_PER_MULTIPROCESSOR = 8192, 2048, 128
_SHARE_OF_FREE = 0.25
_LEAST_FREE_BYTES = 2**28  # torch's allocator takes 20 MiB for what is above one
_REPEATS = 5
_BESIDE_OTHERS = ", beside other programs"
_OWN_SHARE = 0.9  # see share_of_processors; 0.99 on an idle machine
_RANK, _HEADS, _HEAD_DIM, _CPU_ATTENTION_TOKENS = 16, 16, 64, 512


def rates_of(device: ComputeDevice, dtype: torch.dtype, cache: Path, num_ranks: int = 1) -> Rates:
    """Rates measured now, or stored in the folder `cache` by an earlier run on this machine. num_ranks:
    processes that measure at the same time. Leaves nothing on the device."""
    key = rates_key(device.description, dtype, num_ranks)
    kept = _kept(cache)
    if key in kept:
        return kept[key]
    free_bytes = device.free_bytes
    if free_bytes < _LEAST_FREE_BYTES:
        return stated_rates(device.description)
    size = matrix_size(device.description, free_bytes, dtype)
    is_beside = not device.description.is_accelerator and share_of_processors(dtype, size) < _OWN_SHARE
    if is_beside:
        key += _BESIDE_OTHERS
        if key in kept:
            return kept[key]
    host = HostMemory(device)
    buffer = host.empty(min(_COPY_BYTES, int(free_bytes * _SHARE_OF_FREE / 2)))
    rates = _measure(device, dtype, size, buffer)
    device.release_cached()  # what products and copies took would stay beside other sizes
    if is_beside:
        rates = replace(rates, source=f"{rates.source}; other programs were busy, so it may be faster")
    if not host.num_unpinned_bytes and size == _wanted_size(device.description):
        with contextlib.suppress(OSError):  # a disk that may not be written: the next start measures again
            keep_rates(cache, key, rates)
    return rates


def kept_rates(
    device: DeviceDescription, dtype: torch.dtype, cache: Path, num_ranks: int = 1
) -> Rates | None:
    """Rates stored by an earlier run on this machine; None: there are none."""
    key, kept = rates_key(device, dtype, num_ranks), _kept(cache)
    return kept.get(key, kept.get(key + _BESIDE_OTHERS))


def keep_rates(cache: Path, key: str, rates: Rates) -> None:
    """Store rates beside those of other devices and dtypes. Raises `OSError`."""
    cache.mkdir(parents=True, exist_ok=True)
    known = {name: asdict(one) for name, one in _kept(cache).items()}
    replace_text(cache / FILE, seal(known | {key: asdict(rates)}), is_shared=True)


def _kept(cache: Path) -> dict[str, Rates]:
    """Rates by key; without those of a version whose rates are others."""
    try:
        stored = unseal(cache / FILE)
    except (OSError, ValueError):  # not there, or damaged: measured again
        return {}
    names = {column.name for column in fields(Rates)}
    return {
        key: Rates(**rates)
        for key, rates in stored.items()
        if isinstance(rates, dict) and rates.keys() == names
    }


def rates_key(device: DeviceDescription, dtype: torch.dtype, num_ranks: int = 1) -> str:
    """What rates are stored under: device, threads, dtype, torch, this version, processes."""
    name = device.name or platform.processor() or "cpu"
    key = f"{name}, {torch.get_num_threads()} threads, {dtype}, torch {torch.__version__}, {__version__}"
    return f"{key}, {num_ranks} at a time" if num_ranks > 1 else key


def copy_rate(device: ComputeDevice, host: Tensor) -> float:
    """Bytes per second between a uint8 buffer in host memory and the device, in the slower direction."""
    here = torch.empty_like(host, device=device.torch)
    in_seconds = fastest_seconds(device, lambda: here.copy_(host, non_blocking=True))
    out_seconds = fastest_seconds(device, lambda: host.copy_(here, non_blocking=True))
    return host.numel() / max(in_seconds, out_seconds)


def matrix_size(device: DeviceDescription, free_bytes: int, dtype: torch.dtype) -> int:
    """Rows and columns of the products that are timed: three matrices fit in a quarter of free_bytes, so that
    a nearly full card can be measured."""
    most = int(math.sqrt(free_bytes * _SHARE_OF_FREE / (3 * dtype.itemsize))) // 64 * 64
    return min(_wanted_size(device), max(64, most))


def share_of_processors(dtype: torch.dtype, size: int) -> float:
    """The share of the time that this process's threads could compute in, in which they did, measured while
    they multiply: the rest they waited for other programs. 1 where the system does not tell."""
    a = torch.randn(size, size, dtype=dtype)
    computed, waited = _scheduled()
    for _ in range(_REPEATS):
        torch.matmul(a, a.t())
    computed, waited = (now - then for now, then in zip(_scheduled(), (computed, waited), strict=True))
    return computed / (computed + waited) if computed else 1.0


def _scheduled() -> tuple[int, int]:
    """(nanoseconds that this process's threads have run, that they were ready to run and waited)."""
    threads = [
        file.read_text(encoding="ascii").split() for file in Path("/proc/self/task").glob("*/schedstat")
    ]
    return sum(int(times[0]) for times in threads), sum(int(times[1]) for times in threads)


def _wanted_size(device: DeviceDescription) -> int:
    """Rows and columns that give every multiprocessor several tiles."""
    if not device.is_accelerator:
        return _CPU_MATRIX
    return max(64, min(_LARGEST_MATRIX, _ROWS_PER_MULTIPROCESSOR * device.num_multiprocessors) // 64 * 64)


def _measure(device: ComputeDevice, dtype: torch.dtype, size: int, host: Tensor) -> Rates:
    """Time products of size x size, copies of `host` (uint8), and copies within the device."""
    num_bytes = host.numel()
    random = partial(torch.randn, dtype=dtype, device=device.torch)
    a, b = random(size, size), random(size, size)
    product_seconds = fastest_seconds(device, partial(torch.matmul, a, b.t()))
    elementwise_seconds = fastest_seconds(device, partial(_gated, a, b))
    low_seconds = fastest_seconds(device, partial(_low_rank_product, a, random(_RANK, size), b))
    del a, b
    # A GPU attends to a few hundred tokens in less time than the host takes to ask for it.
    num_tokens = size // 2 if device.is_accelerator else min(_CPU_ATTENTION_TOKENS, size)
    attention = _attention_rate(device, dtype, num_tokens)
    copy = copy_rate(device, host)
    here = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch)
    there = torch.empty_like(here)
    memory_seconds = fastest_seconds(device, lambda: there.copy_(here))
    return Rates(
        flops=2 * size**3 / product_seconds,
        attention=attention,
        low_rank=4 * _RANK * size**2 / low_seconds,
        elementwise=5 * dtype.itemsize * size**2 / elementwise_seconds,
        memory=2 * num_bytes / memory_seconds,
        copy=copy,
        disk=stated_rates(device.description).disk,
        source=f"measured here (products of {size} x {size} in {dtype}); disk as stated",
    )


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    """Five reads and writes of as many numbers."""
    return F.silu(gate) * up


def _low_rank_product(x: Tensor, low: Tensor, y: Tensor) -> Tensor:
    """y + (x A^T) A: two products of a rank's width, as LoRA has."""
    return y.addmm_(F.linear(x, low), low)


def _attention_rate(device: ComputeDevice, dtype: torch.dtype, num_tokens: int) -> float:
    """FLOPs per second of the attention that layers run, forward and backward, over one document."""
    q, k, v = (
        torch.randn(1, _HEADS, num_tokens, _HEAD_DIM, dtype=dtype, device=device.torch, requires_grad=True)
        for _ in range(3)
    )
    documents = DocumentLayout.of(np.array([0, num_tokens]), device.torch)
    attend = partial(
        packed_attention,
        nn.Identity(),
        attention_mask=None,
        documents=documents,
        attention_kernels=AttentionKernels.on(device, dtype),
    )

    def run() -> None:
        y, _ = attend(q, k, v)
        torch.autograd.grad(y, (q, k, v), y)

    forward_flops = 2 * num_tokens**2 * _HEADS * _HEAD_DIM
    return 3.5 * forward_flops / fastest_seconds(device, run)


def fastest_seconds(device: ComputeDevice, run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    times = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        run()
        device.wait()
        times.append(time.perf_counter() - started)
    return min(times[1:])
