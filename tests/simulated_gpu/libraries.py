"""bitsandbytes on the simulated device: its operators by their CPU kernels, its managed memory, its waits.

bitsandbytes knows devices by name, and "sim" is none of them. Its operators have CPU kernels, which run on
the same bytes; where an `.out` overload has none, it is the plain operator and a copy. The native library's
managed memory, with which a GPU serves paged optimizers, is managed_memory.py's. After each step it waits for
the device, by `sync_gpu`, of CUDA and XPU only: here too.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from simulated_gpu import device_module, install, private_names
from simulated_gpu.memory import device_tensor
from simulated_gpu.operators import call_on_cpu
from simulated_gpu.simulation import running

_NAMESPACE = "bitsandbytes"


class _WrittenFromPlain:
    """An `.out` overload by way of the one that returns its result."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        *inputs, out = arguments if "out" not in keywords else (*arguments, keywords.pop("out"))
        out.copy_(self._plain(*inputs, **keywords))


@functools.cache
def _register() -> None:
    import bitsandbytes  # noqa: F401 (defines the operators)

    target = install.library(_NAMESPACE)
    for op in private_names.operators_of(_NAMESPACE):
        name, overload = private_names.schema(op).name.split("::")[1], private_names.schema(op).overload_name
        full_name = f"{name}.{overload}" if overload else name
        if private_names.has_kernel(f"{_NAMESPACE}::{full_name}", "PrivateUse1"):
            continue
        lacks_cpu = overload == "out" and not private_names.has_kernel(f"{_NAMESPACE}::{full_name}", "CPU")
        run = _WrittenFromPlain(private_names.packet_of(op).default) if lacks_cpu else None
        target.impl(full_name, functools.partial(call_on_cpu, op, run=run), "PrivateUse1")


class _NativeLibrary:
    """bitsandbytes' native library, with the functions for managed memory that only CUDA's build has."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def cget_managed_ptr(self, num_bytes: Any) -> int:
        return running().managed.allocate(num_bytes.value)

    def cfill_fp32(self, a: Any, b: Any, value: Any, num_elements: Any) -> None:
        self._fill(
            (ctypes.c_float * num_elements.value).from_address(_address(a)), torch.float32, value.value
        )

    def cfill_uint8(self, a: Any, b: Any, value: Any, num_elements: Any) -> None:
        self._fill((ctypes.c_uint8 * num_elements.value).from_address(_address(a)), torch.uint8, value.value)

    def cprefetch(self, pointer: Any, num_bytes: Any, device: Any) -> None:
        running().managed.num_prefetches += 1

    @staticmethod
    def _fill(memory: Any, dtype: torch.dtype, value: float) -> None:
        """A kernel, for which bitsandbytes waits."""
        with running().managed.used_by_device():
            torch.frombuffer(memory, dtype=dtype).fill_(value)
        device_module.synchronize()


def _address(pointer: Any) -> int:
    return pointer if isinstance(pointer, int) else pointer.value


class _Wait:
    """`sync_gpu`, which waits for the device of a tensor."""

    def __init__(self, of_library: Any) -> None:
        self._of_library = of_library

    def __call__(self, tensor: Tensor) -> None:
        if device_tensor(tensor):
            device_module.synchronize()
        else:
            self._of_library(tensor)


def _set(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


@contextmanager
def bitsandbytes_on_device() -> Iterator[None]:
    """While a simulation is on."""
    import bitsandbytes.functional as functional
    import bitsandbytes.optim.optimizer as optimizer

    _register()
    native: Any = functional.lib
    sync: Any = optimizer.sync_gpu
    tables = dict(functional.name2qmap)
    functional.name2qmap.clear()  # code tables: the library keeps them on the device that first asked
    _set(functional, "lib", _NativeLibrary(native))
    _set(optimizer, "sync_gpu", _Wait(sync))
    try:
        yield
    finally:
        functional.name2qmap.clear()
        functional.name2qmap.update(tables)
        _set(functional, "lib", native)
        _set(optimizer, "sync_gpu", sync)
