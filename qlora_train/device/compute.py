"""Operations of the compute device: streams and events, pinning of host pages, memory figures.

All calls go to torch's module for the device type (`torch.cuda`, also for ROCm; `torch.xpu`), found by
`torch.get_device_module`, always with the device's index: a new thread uses the first device unless told
otherwise, and `torch.cuda.set_device` refuses a device without an index.

Why not `torch.accelerator` and `torch.Stream`: they are implemented in C++ for known types only, so tests
could not simulate a device on a machine without one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor

from qlora_train.device.description import CPU, DeviceDescription
from qlora_train.device.step_clock import StepClock

Stream = Any
"""`torch.cuda.Stream`, or the class of another device type's module."""
Event = Any
Moment = Any
"""A time of the host's clock in seconds, or an event that has a time."""


@dataclass(frozen=True)
class ComputeDevice:
    """A device of this machine. description: has an index unless the device is the CPU."""

    description: DeviceDescription
    is_planned: ClassVar[bool] = False
    """Whether this is a device in a plan (planned.py), which need not exist."""

    def __post_init__(self) -> None:
        assert (self.description.index is None) == (self.description.type == "cpu"), self.description

    @cached_property
    def torch(self) -> torch.device:
        """The torch device on which tensors are allocated."""
        index = self.description.index
        return (
            torch.device(self.description.type)
            if index is None
            else torch.device(self.description.type, index)
        )

    @property
    def is_accelerator(self) -> bool:
        return self.description.is_accelerator

    @cached_property
    def _module(self) -> Any:
        assert self.is_accelerator, "the CPU has no streams, and its memory is the host's"
        return torch.get_device_module(self.torch)

    def make_current(self) -> None:
        """Select the device for the calling thread; a new thread uses the first one. No effect on the CPU."""
        if self.is_accelerator:
            self._module.set_device(self.torch)

    def wait(self) -> None:
        """Block the host until all queued work is done."""
        if self.is_accelerator:
            self._module.synchronize(self.torch)

    # Streams: None on the CPU, whose operations are done when the call returns.

    def side_stream(self) -> Stream | None:
        """A new stream, concurrent with the compute stream; None on the CPU."""
        return self._module.Stream(self.torch) if self.is_accelerator else None

    def current_stream(self) -> Stream:
        """The calling thread's stream."""
        return self._module.current_stream(self.torch)

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Context in which work is queued on `stream`."""
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    def event(self, stream: Stream | None = None) -> Event:
        """A new event recorded on `stream`; None: the current stream."""
        event = self._module.Event()
        event.record(self.current_stream() if stream is None else stream)
        return event

    # Time.

    @cached_property
    def clock(self) -> StepClock:
        """The clock of the compute stream."""
        return StepClock(self)

    def moment(self) -> Moment:
        """When the work queued so far on the current stream will be done; on a CPU, now."""
        if not self.is_accelerator:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record(self.current_stream())
        return event

    def seconds_between(self, start: Moment, end: Moment) -> float:
        """Seconds from one moment to another; the host must have waited for both."""
        return float(start.elapsed_time(end) / 1000 if self.is_accelerator else end - start)

    # Pinned host pages, which the device can read and write by itself.

    def pin(self, pages: Tensor) -> bool:
        """Pin host memory (uint8, page-aligned) for asynchronous copies; returns False if the system refuses,
        or if the device's runtime has no call for it."""
        runtime = self._runtime()
        if runtime is None:
            return False
        if int(runtime.cudaHostRegister(pages.data_ptr(), pages.numel(), 0)) == 0:
            return True
        # The runtime would raise the stored error at this thread's next kernel launch: clear it with one.
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self.torch).fill_(0)
        return False

    def unpin(self, address: int) -> None:
        """Unpin the pages that were pinned at `address`; call it before they are freed."""
        runtime = self._runtime()
        assert runtime is not None
        runtime.cudaHostUnregister(address)

    def _runtime(self) -> Any:
        """CUDA's runtime functions, or HIP's under the same names; None for other devices."""
        find: Callable[[], Any] | None = getattr(self._module, "cudart", None)
        return None if find is None else find()

    # Memory, in bytes.

    @cached_property
    def uuid(self) -> str:
        """The card's UUID as the driver reports it, without "GPU-"; empty if torch does not know one."""
        properties = self._module.get_device_properties(self.torch)
        return str(getattr(properties, "uuid", "")).removeprefix("GPU-")

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated now by torch's allocator: tensors and workspaces of libraries."""
        return int(self._module.memory_allocated(self.torch))

    @property
    def peak_allocated_bytes(self) -> int:
        """Largest `allocated_bytes` since `reset_peaks`."""
        return int(self._module.max_memory_allocated(self.torch))

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the device that torch's allocator holds now, in use or cached."""
        return int(self._module.memory_reserved(self.torch))

    @property
    def peak_reserved_bytes(self) -> int:
        """Largest `reserved_bytes` since `reset_peaks`."""
        return int(self._module.max_memory_reserved(self.torch))

    def reset_peaks(self) -> None:
        """Reset both peaks to the current values."""
        self._module.reset_peak_memory_stats(self.torch)

    def memory_stats(self) -> dict[str, int]:
        """All counters of torch's allocator."""
        return dict(self._module.memory_stats(self.torch))

    @property
    def free_bytes(self) -> int:
        """Free bytes of the device, or for the CPU the available RAM."""
        if not self.is_accelerator:
            return int(psutil.virtual_memory().available)
        return int(self._module.mem_get_info(self.torch)[0])

    @property
    def total_bytes(self) -> int:
        """Total bytes of the accelerator's memory."""
        return int(self._module.mem_get_info(self.torch)[1])

    def release_cached(self) -> None:
        """Release the unused memory that torch's allocator holds. No effect on the CPU."""
        if self.is_accelerator:
            self._module.empty_cache()

    def limit_allocator(self, num_bytes: int | None) -> None:
        """Limit torch's allocator to `num_bytes`, as on a smaller device; None: no limit but the device. No
        effect on the CPU."""
        if self.is_accelerator:
            total_bytes = self.total_bytes
            fraction = 1.0 if num_bytes is None else min(1.0, max(0, num_bytes) / total_bytes)
            self._module.set_per_process_memory_fraction(fraction, self.torch)


THE_CPU = ComputeDevice(CPU)


def find_accelerator() -> torch.device | None:
    """The accelerator that torch finds, without an index; None: there is none, or its module does not tell
    how much memory it has, which every plan needs (Apple's MPS, whose memory is the CPU's)."""
    found = torch.accelerator.current_accelerator(check_available=True)
    is_usable = found is not None and hasattr(torch.get_device_module(found), "mem_get_info")
    return found if is_usable else None
