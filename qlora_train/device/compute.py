"""The compute device at work: its streams and events, the host pages it can copy from, its memory figures.

Everything goes through the module that torch has for the device's type (`torch.cuda`, which ROCm has too,
`torch.xpu`), found by `torch.get_device_module`, always with the device's index: a new thread is on the first
device until it is told otherwise, and `torch.cuda.set_device` refuses a device without an index.

Why not `torch.accelerator` and `torch.Stream`: their memory figures and streams are in C++ for known types
only, so no test could stand in for a device without one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor

from qlora_train.device.description import CPU, DeviceDescription

Stream = Any
"""`torch.cuda.Stream`, or what another type's module has for it."""
Event = Any


@dataclass(frozen=True)
class ComputeDevice:
    """A device that is here. description: with its index, unless it is the CPU."""

    description: DeviceDescription
    is_planned: ClassVar[bool] = False
    """Whether it is only planned for (planned.py)."""

    def __post_init__(self) -> None:
        assert (self.description.index is None) == (self.description.type == "cpu"), self.description

    @cached_property
    def torch(self) -> torch.device:
        """Where tensors go."""
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
        """For a new thread, which is on the first device otherwise. Nothing on the CPU."""
        if self.is_accelerator:
            self._module.set_device(self.torch)

    def wait(self) -> None:
        """Let the host wait until all queued work is done."""
        if self.is_accelerator:
            self._module.synchronize(self.torch)

    # Streams: None on the CPU, where work is done when its call returns.

    def side_stream(self) -> Stream | None:
        """A new stream beside the one that computes."""
        return self._module.Stream(self.torch) if self.is_accelerator else None

    def current_stream(self) -> Stream:
        """The calling thread's."""
        return self._module.current_stream(self.torch)

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Work queued inside goes to `stream`."""
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    def event(self, stream: Stream | None = None) -> Event:
        """One recorded now on `stream`, None being the current one."""
        event = self._module.Event()
        event.record(self.current_stream() if stream is None else stream)
        return event

    # Host pages that the device copies from and to by itself.

    def pin(self, pages: Tensor) -> bool:
        """Register host memory (uint8, page-aligned) for copies without the host; False where the system
        refuses, or where the device's runtime has no call for it."""
        runtime = self._runtime()
        if runtime is None:
            return False
        if int(runtime.cudaHostRegister(pages.data_ptr(), pages.numel(), 0)) == 0:
            return True
        # The runtime keeps the error for this thread's next kernel launch to raise: let that be ours.
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self.torch).fill_(0)
        return False

    def unpin(self, address: int) -> None:
        """Of pages that were registered, while they are still there."""
        runtime = self._runtime()
        assert runtime is not None
        runtime.cudaHostUnregister(address)

    def _runtime(self) -> Any:
        """CUDA's runtime functions, or HIP's under the same names."""
        find: Callable[[], Any] | None = getattr(self._module, "cudart", None)
        return None if find is None else find()

    # Memory, in bytes.

    @cached_property
    def uuid(self) -> str:
        """Of the card, as its driver writes it; empty where torch does not know one."""
        properties = self._module.get_device_properties(self.torch)
        return str(getattr(properties, "uuid", "")).removeprefix("GPU-")

    @property
    def allocated_bytes(self) -> int:
        """Of tensors, now; workspaces of the libraries included."""
        return int(self._module.memory_allocated(self.torch))

    @property
    def peak_allocated_bytes(self) -> int:
        """The most since `reset_peaks`."""
        return int(self._module.max_memory_allocated(self.torch))

    @property
    def reserved_bytes(self) -> int:
        """What torch's allocator holds of the device, in use or not, now."""
        return int(self._module.memory_reserved(self.torch))

    @property
    def peak_reserved_bytes(self) -> int:
        """The most since `reset_peaks`."""
        return int(self._module.max_memory_reserved(self.torch))

    def reset_peaks(self) -> None:
        """Let both peaks begin at what there is now."""
        self._module.reset_peak_memory_stats(self.torch)

    def memory_stats(self) -> dict[str, int]:
        """The allocator's counters."""
        return dict(self._module.memory_stats(self.torch))

    @property
    def free_bytes(self) -> int:
        """What could still be taken: of the device, or, for the CPU, of the machine's RAM."""
        if not self.is_accelerator:
            return int(psutil.virtual_memory().available)
        return int(self._module.mem_get_info(self.torch)[0])

    @property
    def total_bytes(self) -> int:
        """The device's memory."""
        return int(self._module.mem_get_info(self.torch)[1])

    def release_cached(self) -> None:
        """Give back what torch's allocator holds without using it. Nothing on the CPU."""
        if self.is_accelerator:
            self._module.empty_cache()

    def limit_allocator(self, num_bytes: int | None) -> None:
        """Let torch's allocator fail beyond so many bytes, as it would on a smaller device; None: beyond the
        device. Nothing on the CPU."""
        if self.is_accelerator:
            total_bytes = self.total_bytes
            fraction = 1.0 if num_bytes is None else min(1.0, max(0, num_bytes) / total_bytes)
            self._module.set_per_process_memory_fraction(fraction, self.torch)


THE_CPU = ComputeDevice(CPU)
