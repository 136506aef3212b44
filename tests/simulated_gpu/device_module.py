"""`torch.sim`: what `torch.cuda` is for CUDA, with the same signatures and the same checks of arguments.

Whether a function takes "sim" without an index is written in torch/cuda/__init__.py, memory.py and
streams.py, by `_get_device_index(device, optional=...)` in each; the flags here are copied from there one by
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simulated_gpu.allocator import MIB
from simulated_gpu.memory import Device
from simulated_gpu.pinning import Runtime
from simulated_gpu.simulation import DEVICE_TYPE, device_at, index_of, is_on, running
from simulated_gpu.streams import Event, Stream, StreamContext, make_current

OutOfMemoryError = torch.OutOfMemoryError
AcceleratorError = torch.AcceleratorError

__all__ = [
    "Event",
    "Stream",
    "StreamContext",
    "can_device_access_peer",
    "cudart",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "device_of",
    "empty_cache",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "get_per_process_memory_fraction",
    "get_rng_state",
    "init",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_peak_memory_stats",
    "set_device",
    "set_per_process_memory_fraction",
    "set_rng_state",
    "set_stream",
    "stream",
    "synchronize",
]
"""Names with the signature of torch.cuda's."""


def is_available() -> bool:
    return is_on()


def is_initialized() -> bool:
    return is_on()


def init() -> None:
    running()


def device_count() -> int:
    return len(running().devices) if is_on() else 0


def current_device() -> int:
    return running().thread.device


def set_device(device: Any) -> None:
    index = index_of(device, optional=False)
    if index >= 0:
        running().thread.device = device_at(index).index


class device:
    """As torch.cuda.device: the current device, in a `with`. Nothing for a negative index."""

    def __init__(self, device: Any) -> None:
        self.idx = index_of(device, optional=True)
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = current_device()
        if self.idx >= 0:
            set_device(self.idx)

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        set_device(self.prev_idx)


class device_of(device):
    """As torch.cuda.device_of: nothing for what is on the host."""

    def __init__(self, obj: Any) -> None:
        super().__init__(obj.get_device() if obj.device.type == DEVICE_TYPE else -1)


def can_device_access_peer(device: Any, peer_device: Any) -> bool:
    indices = index_of(device, optional=True), index_of(peer_device, optional=False)
    for index, name in zip(indices, ("device", "peer device"), strict=True):
        if not 0 <= index < device_count():
            raise AssertionError(f"Invalid {name} id")
    return False


@dataclass(frozen=True)
class DeviceProperties:
    """What a program asks of `get_device_properties`."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int
    warp_size: int = 32
    max_threads_per_multi_processor: int = 1536
    L2_cache_size: int = 32 * MIB
    is_integrated: bool = False
    is_multi_gpu_board: bool = False


def get_device_properties(device: Any = None) -> DeviceProperties:
    running()
    index = index_of(device, optional=True)
    if not 0 <= index < device_count():
        raise AssertionError("Invalid device id")
    settings = running().settings
    return DeviceProperties(
        name=settings.name,
        major=settings.capability[0],
        minor=settings.capability[1],
        total_memory=device_at(index).allocator.total_bytes,
        multi_processor_count=settings.num_multiprocessors,
    )


def get_device_name(device: Any = None) -> str:
    return get_device_properties(device).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    properties = get_device_properties(device)
    return properties.major, properties.minor


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """As torch.cuda's: below capability 8 tensors of bfloat16 can be made, arithmetic is emulated."""
    if not is_available():
        return False
    return including_emulation or get_device_properties(current_device()).major >= 8


def current_stream(device: Any = None) -> Stream:
    running()
    index = index_of(device, optional=True)
    return running().current_stream(device_at(index).index)


def default_stream(device: Any = None) -> Stream:
    running()
    return device_at(index_of(device, optional=True)).default_stream


def stream(stream: Stream | None) -> StreamContext:
    return StreamContext(stream)


def set_stream(stream: Stream) -> None:
    if stream is not None:
        make_current(stream)


def synchronize(device: Any = None) -> None:
    simulation = running()
    index = device_at(index_of(device, optional=True)).index
    simulation.host_reads.note_synchronization("device")
    for each in list(simulation.streams):
        if each.device_index == index:
            each.join_host()


def _device(device: Any) -> Device:
    return device_at(index_of(device, optional=True))


def memory_stats(device: Any = None) -> dict[str, Any]:
    return _device(device).allocator.statistics() if is_on() else {}


def memory_allocated(device: Any = None) -> int:
    return memory_stats(device=device).get("allocated_bytes.all.current", 0)


def max_memory_allocated(device: Any = None) -> int:
    return memory_stats(device=device).get("allocated_bytes.all.peak", 0)


def memory_reserved(device: Any = None) -> int:
    return memory_stats(device=device).get("reserved_bytes.all.current", 0)


def max_memory_reserved(device: Any = None) -> int:
    return memory_stats(device=device).get("reserved_bytes.all.peak", 0)


def reset_peak_memory_stats(device: Any = None) -> None:
    _device(device).allocator.reset_peaks()


def empty_cache() -> None:
    if is_on():
        for each in running().devices:
            each.allocator.empty_cache()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    index = current_device() if device is None else device
    return cudart().cudaMemGetInfo(index_of(index, optional=True))


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    index = index_of(current_device() if device is None else device, optional=False)
    if not isinstance(fraction, float):
        raise TypeError("Invalid type for fraction argument, must be `float`")
    if fraction < 0 or fraction > 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    device_at(index).allocator.fraction = fraction


def get_per_process_memory_fraction(device: Any = None) -> float:
    index = index_of(current_device() if device is None else device, optional=False)
    return device_at(index).allocator.fraction


def cudart() -> Runtime:
    return Runtime()


# Random numbers are drawn by the CPU's kernels, from the CPU's generator: there is no other.


def manual_seed(seed: int) -> None:
    if is_on():
        torch.default_generator.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    manual_seed(seed)


def get_rng_state(device: Any = DEVICE_TYPE) -> Tensor:
    device_at(index_of(device, optional=True))
    return torch.get_rng_state()


def set_rng_state(new_state: Tensor, device: Any = DEVICE_TYPE) -> None:
    device_at(index_of(device, optional=True))
    torch.set_rng_state(new_state)


# What torch itself asks of the module of a device on PrivateUse1.


def _is_in_bad_fork() -> bool:
    return False


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]
