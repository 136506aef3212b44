"""Pinned memory on the simulated GPU: registering, refusing, and the error that the runtime keeps."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from simulated_gpu import device_module as sim
from simulated_gpu.fixture import SimulatedGpu, simulated_gpu_of_test

OUT_OF_MEMORY, INVALID, ALREADY, NOT_REGISTERED = 2, 1, 712, 713


def pages(num_bytes: int = 4096) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def register(buffer: Tensor) -> int:
    return int(sim.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))


def unregister(buffer: Tensor) -> int:
    return int(sim.cudart().cudaHostUnregister(buffer.data_ptr()))


def launch() -> None:
    torch.ones(1, device="sim")


def test_registered_ranges_are_known(simulated_gpu: SimulatedGpu) -> None:
    buffer = pages()
    assert register(buffer) == 0 and simulated_gpu.pinned_bytes == 4096
    assert register(buffer[100:200]) == ALREADY
    with pytest.raises(torch.AcceleratorError, match="already mapped"):
        launch()
    assert unregister(buffer) == 0 and simulated_gpu.pinned_bytes == 0
    assert unregister(buffer) == NOT_REGISTERED
    with pytest.raises(torch.AcceleratorError, match="registered memory region"):
        launch()
    assert int(sim.cudart().cudaHostRegister(0, 10, 0)) == INVALID


def test_a_refusal_is_returned_and_then_raised_once(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.refuse_pinning()
    x = torch.zeros(2, device="sim")
    assert register(pages()) == OUT_OF_MEMORY and simulated_gpu.num_pinning_refused == 1
    view = x[1:].view(1)
    empty = torch.empty(2, device="sim")  # launches nothing
    with pytest.raises(torch.AcceleratorError, match="SIM error: out of memory"):
        empty.fill_(0)
    empty.fill_(1)
    assert view.tolist() == [0] and empty.tolist() == [1, 1]


def test_the_error_is_the_threads_own(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.refuse_pinning()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(register, pages()).result() == OUT_OF_MEMORY
        launch()
        with pytest.raises(torch.AcceleratorError):
            pool.submit(launch).result()


def test_refusing_beyond_some_bytes(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.refuse_pinning(beyond_bytes=10_000)
    buffers = [pages() for _ in range(3)]
    assert [register(b) for b in buffers] == [0, 0, OUT_OF_MEMORY]
    assert unregister(buffers[0]) == 0 and register(buffers[2]) == 0
    with pytest.raises(torch.AcceleratorError):
        launch()


def test_refusing_single_blocks(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.refuse_pinning(blocks={2})
    buffers = [pages() for _ in range(3)]
    assert [register(b) for b in buffers] == [0, OUT_OF_MEMORY, 0]
    with pytest.raises(torch.AcceleratorError):
        launch()
    simulated_gpu.allow_pinning()
    assert register(buffers[1]) == 0


def test_only_pinned_copies_are_asynchronous(simulated_gpu: SimulatedGpu) -> None:
    pinned, pageable = pages(), pages()
    register(pinned)
    reads = simulated_gpu.host_reads
    x = torch.zeros(4096, dtype=torch.uint8, device="sim")
    side = sim.Stream()
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        x.copy_(pinned, non_blocking=True)
        pinned.copy_(x, non_blocking=True)
        assert not reads.copies and not reads.values
        x.copy_(pageable, non_blocking=True)
        assert [what for what, _ in reads.copies] == ["pageable memory, non_blocking"]
        x.float().copy_(pinned, non_blocking=True)  # another dtype goes by way of a pageable buffer
        assert reads.copies.total() == 2
        pageable.copy_(x, non_blocking=True)
        x.copy_(pinned)
    assert [what for what, _ in reads.values] == ["copy to the host"]
    assert [what for what, _ in reads.copies][-1] == "pinned memory, blocking"
    side.synchronize()


def test_pageable_sources_are_read_before_the_copy_returns(simulated_gpu: SimulatedGpu) -> None:
    source, side = torch.ones(4), sim.Stream()
    with sim.stream(side):
        x = torch.zeros(4, device="sim")
        x.copy_(source, non_blocking=True)
        source.fill_(5)
    side.synchronize()
    assert x.tolist() == [1, 1, 1, 1]


def test_what_outlives_a_simulation_can_be_unregistered() -> None:
    with simulated_gpu_of_test():
        buffer = pages()
        register(buffer)
    assert unregister(buffer) == 0
    with simulated_gpu_of_test():
        launch()
