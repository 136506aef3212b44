"""Switches the simulated GPU on for one test: `simulated_gpu`, and the handle that it gives.

def test_a_step_reads_one_number(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.settings.capability = (7, 5)      # how the GPU is
    simulated_gpu.refuse_pinning(blocks={2})        # what goes wrong on it
    simulated_gpu.fail_allocation(400)
    train_on(simulated_gpu.device)
    assert simulated_gpu.host_reads.values.total() == 1
    assert simulated_gpu.peak_bytes() < PLANNED     # what was seen
                                                    # and no hazards, or the test fails
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from simulated_gpu.allocator import GIB
from simulated_gpu.hazards import Hazards
from simulated_gpu.host_reads import HostReads
from simulated_gpu.install import install
from simulated_gpu.managed_memory import ManagedMemory
from simulated_gpu.memory import Device
from simulated_gpu.pinning import PinnedRanges, Refusals
from simulated_gpu.registration import obstacle
from simulated_gpu.simulation import DEVICE_TYPE, Settings, Simulation, is_on, set_current
from simulated_gpu.storages import storages_of_device
from simulated_gpu.streams import Stream

ACCELERATE_DEVICE = "ACCELERATE_TORCH_DEVICE"


class SimulatedGpu:
    """The simulated GPUs of a test: how they shall be, and what was seen on them."""

    def __init__(self, simulation: Simulation, total_bytes: int) -> None:
        self._simulation, self._total_bytes = simulation, total_bytes
        self.num_devices = 1

    @property
    def device(self) -> torch.device:
        """The first one."""
        return torch.device(DEVICE_TYPE, 0)

    @property
    def settings(self) -> Settings:
        """Name, capability, poison, lazy streams, managed access; changes hold from now on."""
        return self._simulation.settings

    @property
    def num_devices(self) -> int:
        return len(self._simulation.devices)

    @num_devices.setter
    def num_devices(self, number: int) -> None:
        """Adds devices, or takes the last ones away."""
        devices = self._simulation.devices
        del devices[number:]
        for index in range(len(devices), number):
            stream = Stream.make_default(self._simulation, index)
            devices.append(Device(index, self._total_bytes, stream))

    def set_total_memory(self, num_bytes: int) -> None:
        """Of each device."""
        self._total_bytes = num_bytes
        for device in self._simulation.devices:
            device.allocator.total_bytes = num_bytes

    def limit_memory(self, num_bytes: int | None, device: int = 0) -> None:
        """What this process can reserve at most; the rest is somebody else's. None: all of it."""
        self._simulation.devices[device].allocator.limit_bytes = num_bytes

    def fail_allocation(self, number: int, device: int = 0) -> None:
        """The number-th allocation from now runs out of memory, whatever its size; 1 is the next."""
        self._simulation.devices[device].allocator.fail_after = number - 1

    def refuse_pinning(
        self, *, beyond_bytes: int | None = None, blocks: frozenset[int] | set[int] | None = None
    ) -> None:
        """All of it; or what goes beyond some bytes in all; or the blocks of these numbers, from 1 as of
        now."""
        every = beyond_bytes is None and blocks is None
        self._simulation.pinned.refusals = Refusals(every, beyond_bytes, frozenset(blocks or ()))

    def allow_pinning(self) -> None:
        self._simulation.pinned.refusals = Refusals()

    @property
    def hazards(self) -> list[str]:
        """Conflicting accesses without an order that were found so far, with the places of both."""
        return list(self._simulation.hazards.found)

    def take_hazards(self) -> list[str]:
        """The same, for a test that expects them: what is left at its end fails it."""
        found = self.hazards
        self._simulation.hazards.found.clear()
        return found

    @property
    def host_reads(self) -> HostReads:
        """What made the host wait, with file and line. `host_reads.clear()` begins anew."""
        return self._simulation.host_reads

    @property
    def num_calls(self) -> Counter[str]:
        """Of each operator."""
        return self._simulation.num_calls

    @property
    def num_operators(self) -> int:
        return sum(self._simulation.num_calls.values())

    @property
    def num_allocations(self) -> int:
        return sum(device.allocator.num_allocations for device in self._simulation.devices)

    @property
    def num_prefetches(self) -> int:
        """Of managed memory."""
        return self._simulation.managed.num_prefetches

    @property
    def pinned_bytes(self) -> int:
        return self._simulation.pinned.num_bytes

    @property
    def num_pinning_refused(self) -> int:
        return self._simulation.pinned.num_refused

    def live_bytes(self, device: int = 0) -> int:
        return self._simulation.devices[device].allocator.allocated_bytes

    def peak_bytes(self, device: int = 0) -> int:
        return self._simulation.devices[device].allocator.figures["allocated_bytes", "all"].peak

    def reserved_bytes(self, device: int = 0) -> int:
        return self._simulation.devices[device].allocator.reserved_bytes

    def finish(self) -> None:
        """All queued work is done, and the sources of copies are looked at for the last time."""
        for stream in list(self._simulation.streams):
            stream.join_host()


@contextmanager
def switched_on(*, num_devices: int = 1, total_bytes: int = 8 * GIB) -> Iterator[SimulatedGpu]:
    """A simulation, from here to the end of the block. Hazards are not looked at: fixture and command do."""
    assert not is_on(), "one simulation at a time"
    install()
    settings = Settings()
    simulation = Simulation(settings, Hazards(), HostReads(), PinnedRanges(), ManagedMemory())
    with ExitStack() as stack:
        set_current(simulation)
        stack.callback(_end, simulation)
        gpu = SimulatedGpu(simulation, total_bytes)
        gpu.num_devices = num_devices
        stack.enter_context(_accelerate_takes_device())
        stack.enter_context(_libraries())
        yield gpu
        gpu.finish()


def _end(simulation: Simulation) -> None:
    simulation.managed.end()
    simulation.pinned.leave()
    set_current(None)


@contextmanager
def _libraries() -> Iterator[None]:
    """What other libraries must be told of the device."""
    from simulated_gpu.collectives import ranks_on_device
    from simulated_gpu.libraries import bitsandbytes_on_device

    flash_before = torch.backends.cuda.is_flash_attention_available
    torch.backends.cuda.is_flash_attention_available = _has_flash
    try:
        with ExitStack() as stack:
            stack.enter_context(bitsandbytes_on_device())
            stack.enter_context(storages_of_device())
            if "RANK" in os.environ:
                stack.enter_context(ranks_on_device())
            yield
    finally:
        torch.backends.cuda.is_flash_attention_available = flash_before


def _has_flash() -> bool:
    """As a torch for CUDA answers, on every card."""
    return True


@contextmanager
def _accelerate_takes_device() -> Iterator[None]:
    """Without an index, as accelerate names CUDA's. What it remembers of the process is forgotten, before and
    after."""
    before = os.environ.get(ACCELERATE_DEVICE)
    os.environ[ACCELERATE_DEVICE] = DEVICE_TYPE
    _forget_state_of_accelerate()
    try:
        yield
    finally:
        _forget_state_of_accelerate()
        if before is None:
            del os.environ[ACCELERATE_DEVICE]
        else:
            os.environ[ACCELERATE_DEVICE] = before


def _forget_state_of_accelerate() -> None:
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@contextmanager
def simulated_gpu_of_test() -> Iterator[SimulatedGpu]:
    """The body of the fixture `simulated_gpu`: on for one test, which fails for hazards that it has not
    taken."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(reason)
    with switched_on() as gpu:
        yield gpu
    if gpu.hazards:
        pytest.fail("hazards on the simulated GPU:\n  " + "\n  ".join(gpu.hazards), pytrace=False)
