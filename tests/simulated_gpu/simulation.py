"""What is simulated now: settings, devices and everything that is noted down, in one object.

A fixture makes one `Simulation` and ends it; no state outlives it, and nothing here is a global but the
reference to it. Kernels that torch calls find it by `running()`.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from simulated_gpu import private_names

if TYPE_CHECKING:
    from simulated_gpu.hazards import Hazards
    from simulated_gpu.host_reads import HostReads
    from simulated_gpu.managed_memory import ManagedMemory
    from simulated_gpu.memory import Device
    from simulated_gpu.pinning import PinnedRanges
    from simulated_gpu.streams import Stream

DEVICE_TYPE = "sim"
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@dataclass
class Settings:
    """How the simulated GPUs are. A test may change any of them at any time."""

    name: str = "Simulated GPU"
    capability: tuple[int, int] = (8, 9)
    """CUDA's compute capability: below (8, 0) there is no bfloat16 arithmetic and no flash attention."""
    num_multiprocessors: int = 16
    poison: bool = True
    """Fresh memory is filled with 0xFF: NaN in every float type, -1 in integers."""
    lazy: bool = True
    """Work on side streams is done when something waits for it, not before."""
    context_bytes: int = 0
    """What the driver's context takes of each device, from the first kernel on."""
    concurrent_managed_access: bool = True
    """Whether the host may touch managed memory while the device works. Not so under Windows and WSL."""


class ThreadState(threading.local):
    """What CUDA keeps per host thread: the current device (0 in a new thread), each device's current stream,
    and the last error of the runtime, which the next kernel launch raises."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Stream] = {}
        self.error: str | None = None
        self.outer: list[tuple[int, Stream]] = []
        """For each `with stream:` that the thread is in, the device and stream before."""


@dataclass
class Simulation:
    """From the moment a fixture switches the device on until it is switched off."""

    settings: Settings
    hazards: Hazards
    host_reads: HostReads
    pinned: PinnedRanges
    managed: ManagedMemory
    devices: list[Device] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    """All ever made: side streams are few."""
    thread: ThreadState = field(default_factory=ThreadState)
    lock: threading.RLock = field(default_factory=threading.RLock)
    host_memory: dict[int, torch.Tensor] = field(default_factory=dict)
    """The memory under each live storage, by address: queued work keeps it."""
    num_calls: Counter[str] = field(default_factory=Counter)
    """Of each operator."""
    products_may_be_deterministic: bool | None = None
    """What the environment said at the first product. torch reads it then and never again."""

    def current_stream(self, index: int) -> Stream:
        """Of a device, for the calling thread."""
        return self.thread.streams.get(index) or self.devices[index].default_stream

    def multiply(self) -> None:
        """A product on a device: a RuntimeError where it must be deterministic and cuBLAS was not told so."""
        if self.products_may_be_deterministic is None:
            self.products_may_be_deterministic = os.environ.get(WORKSPACE_VARIABLE) in (":4096:8", ":16:8")
        only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
        must = torch.are_deterministic_algorithms_enabled() and not only_warns
        if must and not self.products_may_be_deterministic:
            raise RuntimeError(
                f"cuBLAS is not deterministic: {WORKSPACE_VARIABLE}=:4096:8 was not set in time"
            )

    def launch(self, device: Device) -> None:
        """A kernel is launched: an error that the runtime still keeps for this thread is raised by it."""
        device.allocator.context_bytes = self.settings.context_bytes
        if self.thread.error is not None:
            text, self.thread.error = self.thread.error, None
            raise torch.AcceleratorError(f"SIM error: {text}")


_current: Simulation | None = None


def is_on() -> bool:
    """Whether there is a simulated GPU now."""
    return _current is not None


def running() -> Simulation:
    """What is simulated now; as without a GPU, a RuntimeError where nothing is."""
    if _current is None:
        raise RuntimeError(
            "no simulated GPU is switched on: a test asks for one by the fixture simulated_gpu"
        )
    return _current


def set_current(simulation: Simulation | None) -> None:
    """Switches on (or off)."""
    global _current
    _current = simulation


def index_of(device: Any, *, optional: bool) -> int:
    """A device's index as torch.cuda takes it: a number as it is, "sim" without one only where it is
    optional.

    Raises the ValueError that CUDA's functions raise for a device without an index and for another type.
    """
    if isinstance(device, int):
        return device
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device) and device.type != DEVICE_TYPE:
        raise ValueError(f"Expected a {DEVICE_TYPE} device, but got: {device}")
    if optional and (device is None or device.index is None):
        return running().thread.device
    return private_names.device_index(device, optional=False)


def device_at(index: int) -> Device:
    """Raises what CUDA raises for a number that no device has."""
    devices = running().devices
    if not 0 <= index < len(devices):
        raise torch.AcceleratorError(f"SIM error: invalid device ordinal ({index} of {len(devices)} devices)")
    return devices[index]
